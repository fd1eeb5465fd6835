# SPDX-License-Identifier: BSD-3-Clause
# Finds LibTorch without enabling the CUDA language, and defines
#   ReshardTorch::torch   headers, c10 and torch_cpu: enough for every CPU program
#   ReshardTorch::cuda    in addition torch_cuda, the CUDA and NCCL headers (only where LibTorch has CUDA)
# Searched in this order: RESHARD_TORCH_ROOT, each entry of CMAKE_PREFIX_PATH (variable, then environment; a LibTorch distribution or a
# site-packages/torch folder, or the folder that holds one), the project's own .venv, and for an installed reshard the LibTorch that it was
# built with. Sets ReshardTorch_ROOT_DIR, ReshardTorch_VERSION and ReshardTorch_CUDA_FOUND.
#
# The wheel's own package file asks for a CUDA compiler and links an older system NCCL; taking the libraries straight from
# the folder needs neither.
set(_roots ${RESHARD_TORCH_ROOT})
set(_prefixes "$ENV{CMAKE_PREFIX_PATH}")
string(REPLACE ":" ";" _prefixes "${_prefixes}")
foreach(prefix IN LISTS CMAKE_PREFIX_PATH _prefixes)
  list(APPEND _roots "${prefix}" "${prefix}/torch" "${prefix}/libtorch")
endforeach()
file(GLOB _venv "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch")
list(APPEND _roots ${_venv} ${_reshard_built_with})

set(ReshardTorch_ROOT_DIR "")
foreach(root IN LISTS _roots)
  if(EXISTS "${root}/include/ATen/ATen.h" AND EXISTS "${root}/lib/libtorch_cpu.so")
    set(ReshardTorch_ROOT_DIR "${root}")
    break()
  endif()
endforeach()

set(_lines "")
if(ReshardTorch_ROOT_DIR AND EXISTS "${ReshardTorch_ROOT_DIR}/include/torch/headeronly/version.h")
  file(STRINGS "${ReshardTorch_ROOT_DIR}/include/torch/headeronly/version.h" _lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
elseif(ReshardTorch_ROOT_DIR)
  file(STRINGS "${ReshardTorch_ROOT_DIR}/include/torch/csrc/api/include/torch/version.h" _lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
endif()
list(TRANSFORM _lines REPLACE "^.*VERSION_(MAJOR|MINOR|PATCH) +([0-9]+).*$" "\\2")
list(JOIN _lines "." ReshardTorch_VERSION)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ReshardTorch
  REQUIRED_VARS ReshardTorch_ROOT_DIR
  VERSION_VAR ReshardTorch_VERSION
  REASON_FAILURE_MESSAGE "no LibTorch found: run scripts/setup, or pass -DCMAKE_PREFIX_PATH=<LibTorch folder>")
if(NOT ReshardTorch_FOUND)
  return()
endif()

# A wheel keeps CUDA's headers and libraries in sibling packages; a LibTorch distribution leaves them to the system.
get_filename_component(_site "${ReshardTorch_ROOT_DIR}/.." ABSOLUTE)
file(GLOB _nvidia_include "${_site}/nvidia/*/include")
file(GLOB _nvidia_lib "${_site}/nvidia/*/lib")

if(NOT TARGET ReshardTorch::torch)
  foreach(lib c10 torch_cpu)
    add_library(ReshardTorch::${lib} SHARED IMPORTED)
    set_target_properties(ReshardTorch::${lib} PROPERTIES IMPORTED_LOCATION "${ReshardTorch_ROOT_DIR}/lib/lib${lib}.so")
  endforeach()
  add_library(ReshardTorch::torch INTERFACE IMPORTED)
  target_link_libraries(ReshardTorch::torch INTERFACE ReshardTorch::torch_cpu ReshardTorch::c10)
  target_include_directories(ReshardTorch::torch SYSTEM INTERFACE
    "${ReshardTorch_ROOT_DIR}/include" "${ReshardTorch_ROOT_DIR}/include/torch/csrc/api/include")
  target_compile_definitions(ReshardTorch::torch INTERFACE USE_DISTRIBUTED USE_C10D_GLOO)
  target_link_options(ReshardTorch::torch INTERFACE "-Wl,-rpath,${ReshardTorch_ROOT_DIR}/lib")
endif()

set(ReshardTorch_CUDA_FOUND OFF)
find_path(ReshardTorch_CUDA_INCLUDE cuda_runtime_api.h HINTS ${_nvidia_include} /usr/local/cuda/include)
find_path(ReshardTorch_NCCL_INCLUDE nccl.h HINTS ${_nvidia_include})
mark_as_advanced(ReshardTorch_CUDA_INCLUDE ReshardTorch_NCCL_INCLUDE)
if(EXISTS "${ReshardTorch_ROOT_DIR}/lib/libtorch_cuda.so" AND ReshardTorch_CUDA_INCLUDE AND ReshardTorch_NCCL_INCLUDE)
  set(ReshardTorch_CUDA_FOUND ON)
  if(NOT TARGET ReshardTorch::cuda)
    foreach(lib c10_cuda torch_cuda)
      add_library(ReshardTorch::${lib} SHARED IMPORTED)
      set_target_properties(ReshardTorch::${lib} PROPERTIES IMPORTED_LOCATION "${ReshardTorch_ROOT_DIR}/lib/lib${lib}.so")
    endforeach()
    add_library(ReshardTorch::cuda INTERFACE IMPORTED)
    target_link_libraries(ReshardTorch::cuda INTERFACE ReshardTorch::torch_cuda ReshardTorch::c10_cuda ReshardTorch::torch)
    target_include_directories(ReshardTorch::cuda SYSTEM INTERFACE ${ReshardTorch_CUDA_INCLUDE} ${ReshardTorch_NCCL_INCLUDE})
    target_compile_definitions(ReshardTorch::cuda INTERFACE USE_C10D_NCCL)
    # The wheel's own NCCL and CUDA libraries first: an older system NCCL lacks symbols that torch_cuda needs.
    list(TRANSFORM _nvidia_lib PREPEND "-Wl,-rpath-link," OUTPUT_VARIABLE _rpath_link)
    target_link_options(ReshardTorch::cuda INTERFACE ${_rpath_link})
  endif()
endif()
