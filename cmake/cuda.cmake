# The CUDA backend: cuda/. What needs no device (plans) is always built and tested; kernels and
# everything that calls the driver only with KVLOOM_CUDA and nvcc.
option(KVLOOM_CUDA "Build the CUDA backend (needs nvcc, made with 13.0; for H100 and H200)" OFF)

set(KVLOOM_WITH_CUDA OFF)
if(KVLOOM_CUDA)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    # The kernels use instructions of exactly this architecture, so nothing is left to choose.
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(KVLOOM_WITH_CUDA ON)
  else()
    message(WARNING "KVLOOM_CUDA is on, but there is no nvcc: building without the CUDA backend")
  endif()
endif()
message(STATUS "CUDA backend: ${KVLOOM_WITH_CUDA}")

# kvl_cuda: plans, plain C. kvl_cuda_device: kernels and driver calls.
function(kvl_cuda)
  add_library(kvl_cuda STATIC ${CMAKE_SOURCE_DIR}/cuda/plan.c)
  target_include_directories(kvl_cuda PUBLIC ${CMAKE_SOURCE_DIR})
  target_link_libraries(kvl_cuda PUBLIC kvl_flags kvl_compute kvl_attention)
  if(NOT KVLOOM_WITH_CUDA)
    return()
  endif()
  file(GLOB kernels CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/cuda/*.cu)
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/cuda/*.c)
  list(FILTER sources EXCLUDE REGEX "/plan\\.c$")
  add_library(kvl_cuda_kernels STATIC ${kernels})
  kvl_cuda_flags(kvl_cuda_kernels)
  add_library(kvl_cuda_device STATIC ${sources})
  target_link_libraries(kvl_cuda_device PUBLIC kvl_cuda kvl_cuda_kernels CUDA::cudart_static
    CUDA::cublas)
  # compute names the backend that lives here: whoever links a room gets it.
  target_link_libraries(kvl_compute INTERFACE kvl_cuda_device)
endfunction()

# ptxas tells by C7519 that it put a fence before a matrix instruction: not a warning.
function(kvl_cuda_flags target)
  target_include_directories(${target} PRIVATE ${CMAKE_SOURCE_DIR})
  target_compile_definitions(${target} PRIVATE KVL_VERSION="${PROJECT_VERSION}")
  set(flags -std=c++17 -O3 -lineinfo
      "SHELL:-gencode arch=compute_90a,code=sm_90a"
      "SHELL:-Xcompiler -Wall,-Wextra"
      "SHELL:-Werror all-warnings")
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${flags}>")
endfunction()

# tests/cuda/*_test.c and tests/bench/gpu_*.c: they end with 77 (skipped) without a device.
function(kvl_cuda_tests)
  if(NOT KVLOOM_WITH_CUDA)
    return()
  endif()
  file(GLOB tests CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/cuda/*_test.c)
  foreach(test ${tests})
    get_filename_component(name ${test} NAME_WE)
    add_executable(${name} ${test})
    target_link_libraries(${name} PRIVATE kvl_test_support kvl_cuda_device PkgConfig::CMOCKA)
    add_test(NAME ${name} COMMAND ${name})
    set_tests_properties(${name} PROPERTIES TIMEOUT 300 SKIP_RETURN_CODE 77)
  endforeach()
  add_library(kvl_gpu_support STATIC ${CMAKE_SOURCE_DIR}/tests/bench/gpu_support.cu)
  kvl_cuda_flags(kvl_gpu_support)
  target_include_directories(kvl_gpu_support PUBLIC ${CMAKE_SOURCE_DIR}/tests/bench)
  file(GLOB benches CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/bench/gpu_*.c)
  foreach(bench ${benches})
    get_filename_component(name ${bench} NAME_WE)
    string(REPLACE _ - program ${name})
    add_executable(${program} ${bench})
    target_link_libraries(${program} PRIVATE kvl_cuda_device kvl_gpu_support)
  endforeach()
endfunction()
