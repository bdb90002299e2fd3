# CUDA is found or not found, never required: everything but kernels/cuda/cuda_device.* and collective/nccl/cuda_stream.* is built
# without it, and both are left out then. NCCL is loaded when the program runs (collective/nccl/nccl_api.h).
set(EDUBA_CUDA AUTO CACHE STRING "CUDA kernels: AUTO (where nvcc 12.4 or newer is found), ON (fail without), OFF")
set_property(CACHE EDUBA_CUDA PROPERTY STRINGS AUTO ON OFF)
option(EDUBA_CUDA_WGMMA "Products of warpgroups (wgmma) on sm_90a; without it a Hopper multiplies as other GPUs do" OFF)
set(EDUBA_HAS_CUDA FALSE)
set(EDUBA_CUDA_MINIMUM 12.4)

# A sanitizer of the host's memory does not get along with the driver's.
if(EDUBA_CUDA STREQUAL "OFF" OR ((EDUBA_SANITIZE OR EDUBA_FUZZ) AND NOT EDUBA_CUDA STREQUAL "ON"))
  message(STATUS "CUDA: not looked for")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(EDUBA_NVCC nvcc HINTS /usr/local/cuda/bin)
  if(EDUBA_NVCC)
    set(CMAKE_CUDA_COMPILER ${EDUBA_NVCC})
  endif()
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # A100 and its kin; H100 and H200; and code that a newer driver compiles for whatever comes later.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
endif()

include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_release "${nvcc_says}")
  if(CMAKE_MATCH_1 VERSION_GREATER_EQUAL EDUBA_CUDA_MINIMUM)
    enable_language(CUDA)
    find_package(CUDAToolkit ${EDUBA_CUDA_MINIMUM} QUIET)
    set(EDUBA_HAS_CUDA ${CUDAToolkit_FOUND})
  else()
    set(nvcc_reason ", found ${CMAKE_MATCH_1}")
  endif()
endif()

if(NOT EDUBA_HAS_CUDA)
  if(EDUBA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "EDUBA_CUDA=ON needs nvcc ${EDUBA_CUDA_MINIMUM} or newer and its runtime${nvcc_reason}")
  endif()
  message(STATUS "CUDA: not built (wants nvcc ${EDUBA_CUDA_MINIMUM} or newer${nvcc_reason})")
  return()
endif()

message(STATUS "CUDA: ${CUDAToolkit_VERSION}, for ${CMAKE_CUDA_ARCHITECTURES}")
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  # CMake 3.25 does not know that nvcc has spoken C++20 since 12.0.
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
# A binary that starts on machines without CUDA's libraries; the static runtime opens the driver by itself.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
