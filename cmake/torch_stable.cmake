# Finds torch's headers and libtorch.so without find_package(Torch), whose CMake files set flags, architectures and a
# full C++ ABI that kvopt does not want.

# Sets KVOPT_TORCH_DIR (the installed torch package). Inside pip's isolated build the interpreter's sysconfig still names
# the real environment, so a torch that is installed there is found although it cannot be imported.
function(kvopt_find_torch)
  set(KVOPT_TORCH_DIR "" CACHE PATH "Folder of the installed torch package (found by itself when empty)")
  if(NOT KVOPT_TORCH_DIR)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -I "${CMAKE_CURRENT_SOURCE_DIR}/cmake/find_torch.py"
      OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status)
    if(status EQUAL 0)
      set(KVOPT_TORCH_DIR "${found}" CACHE PATH "" FORCE)
    endif()
  endif()
  if(NOT EXISTS "${KVOPT_TORCH_DIR}/include/torch/csrc/stable/library.h")
    message(FATAL_ERROR
      "kvopt needs an installed torch >= 2.11 in the environment it is installed into (${Python_EXECUTABLE}).\n"
      "Type:  pip install 'torch>=2.11'\n"
      "and then install kvopt again. If torch lives elsewhere, name its folder: "
      "-C cmake.define.KVOPT_TORCH_DIR=/path/to/site-packages/torch")
  endif()
  file(STRINGS "${KVOPT_TORCH_DIR}/version.py" lines REGEX "^__version__|^cuda")
  string(REGEX MATCH "__version__[^'\"]*['\"]([0-9]+)\\.([0-9]+)[^'\"]*['\"]" _ "${lines}")
  set(version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  if(version VERSION_LESS 2.11)
    message(FATAL_ERROR "kvopt needs torch >= 2.11, found ${version} in ${KVOPT_TORCH_DIR}.\n"
                        "Type:  pip install --upgrade 'torch>=2.11'")
  endif()
  set(has_cuda OFF)
  if(lines MATCHES "cuda[^=]*= *['\"][0-9]")
    set(has_cuda ON)
  endif()
  set(KVOPT_TORCH_HAS_CUDA ${has_cuda} PARENT_SCOPE)
  message(STATUS "kvopt: torch ${version} in ${KVOPT_TORCH_DIR} (CUDA ${has_cuda})")
endfunction()

function(kvopt_link_torch target)
  target_include_directories(${target} SYSTEM PRIVATE "${KVOPT_TORCH_DIR}/include")
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=0x020b000000000000)  # 2.11
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:-fmacro-prefix-map=${KVOPT_TORCH_DIR}/include=torch>")
  # libtorch.so alone, and kept although no symbol of its own is used: on a CUDA build it brings in libtorch_cuda, where
  # the weakly declared current-stream function lives. Linking libtorch_cpu.so instead leaves that symbol null.
  target_link_options(${target} PRIVATE
    "LINKER:--push-state,--no-as-needed,${KVOPT_TORCH_DIR}/lib/libtorch.so,--pop-state")
  set_target_properties(${target} PROPERTIES BUILD_RPATH "${KVOPT_TORCH_DIR}/lib" INSTALL_RPATH "$ORIGIN/../torch/lib")
endfunction()
