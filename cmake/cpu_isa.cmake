# One file per instruction set, each with its own flags; nothing is compiled library-wide for more than the baseline.
# Processors other than x86-64 get the portable kernels alone (qlinear.cpp asks the same question of the compiler).

function(kvopt_add_cpu_kernels target)
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  set(vnni ${avx512} -mavx512vnni)
  set(folder "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu")
  add_library(${target} STATIC
    ${folder}/isa.cpp
    ${folder}/qlinear.cpp
    ${folder}/wquant.cpp
    ${folder}/qlinear_scalar.cpp)
  target_include_directories(${target} PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    foreach(isa avx2 avx512 vnni)
      target_sources(${target} PRIVATE ${folder}/qlinear_${isa}.cpp)
      set_source_files_properties(${folder}/qlinear_${isa}.cpp PROPERTIES COMPILE_OPTIONS "${${isa}}")
    endforeach()
  endif()
  if(NOT KVOPT_SANITIZE)
    target_compile_options(${target} PRIVATE "$<$<CONFIG:Release>:-O3>")
  endif()
endfunction()
