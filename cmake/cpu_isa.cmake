# One file per instruction set, each with its own flags; nothing is compiled library-wide for more than the baseline.
# Processors other than x86-64 get the portable kernels alone (qlinear.cpp asks the same question of the compiler).

function(kvopt_add_cpu_kernels target)
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  set(vnni ${avx512} -mavx512vnni)
  set(amx ${vnni} -mamx-tile -mamx-int8 -mamx-bf16)
  set(folder "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu")
  add_library(${target} STATIC
    ${folder}/gptq.cpp
    ${folder}/isa.cpp
    ${folder}/kv_attention.cpp
    ${folder}/kv_evict.cpp
    ${folder}/kv_merge.cpp
    ${folder}/kv_merge_evict.cpp
    ${folder}/kv_quant.cpp
    ${folder}/kv_select.cpp
    ${folder}/kv_victim.cpp
    ${folder}/outliers.cpp
    ${folder}/qlinear.cpp
    ${folder}/qlinear_layout.cpp
    ${folder}/qlinear_a8.cpp
    ${folder}/qlinear_a8_scalar.cpp
    ${folder}/qlinear_amx.cpp
    ${folder}/wquant.cpp
    ${folder}/wquant_rtn.cpp
    ${folder}/wquant_scales.cpp
    ${folder}/wsearch.cpp
    ${folder}/qlinear_scalar.cpp)
  target_include_directories(${target} PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    foreach(isa avx2 avx512 vnni)
      foreach(stem qlinear qlinear_a8)
        target_sources(${target} PRIVATE ${folder}/${stem}_${isa}.cpp)
        set_source_files_properties(${folder}/${stem}_${isa}.cpp PROPERTIES COMPILE_OPTIONS "${${isa}}")
      endforeach()
    endforeach()
    foreach(isa avx2 avx512)
      foreach(stem kv_attention kv_evict)
        target_sources(${target} PRIVATE ${folder}/${stem}_${isa}.cpp)
        set_source_files_properties(${folder}/${stem}_${isa}.cpp PROPERTIES COMPILE_OPTIONS "${${isa}}")
      endforeach()
    endforeach()
    # Without fused multiply-add: these bits are those of a multiplication and an addition.
    target_sources(${target} PRIVATE ${folder}/wquant_scales_avx2.cpp)
    set_source_files_properties(${folder}/wquant_scales_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mf16c")
    target_sources(${target} PRIVATE ${folder}/wsearch_avx2.cpp ${folder}/wsearch_avx512.cpp)
    set_source_files_properties(${folder}/wsearch_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2")
    set_source_files_properties(${folder}/wsearch_avx512.cpp PROPERTIES
                                COMPILE_OPTIONS "-mavx512f;-mavx512dq;-mprefer-vector-width=512;-ffp-contract=off")
    foreach(stem qlinear_amx_bf16 qlinear_amx_int8)
      target_sources(${target} PRIVATE ${folder}/${stem}.cpp)
      set_source_files_properties(${folder}/${stem}.cpp PROPERTIES COMPILE_OPTIONS "${amx}")
    endforeach()
  endif()
  if(NOT KVOPT_SANITIZE)
    target_compile_options(${target} PRIVATE "$<$<CONFIG:Release>:-O3>")
  endif()
endfunction()
