# SPDX-License-Identifier: BSD-3-Clause
# Finds libzstd and defines ReshardZstd::zstd. Not every distribution has its CMake file in the package.
find_path(ReshardZstd_INCLUDE_DIR zstd.h)
find_library(ReshardZstd_LIBRARY zstd)
mark_as_advanced(ReshardZstd_INCLUDE_DIR ReshardZstd_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ReshardZstd
  REQUIRED_VARS ReshardZstd_LIBRARY ReshardZstd_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "libzstd is missing: run scripts/setup (or install libzstd-dev)")

if(ReshardZstd_FOUND AND NOT TARGET ReshardZstd::zstd)
  add_library(ReshardZstd::zstd UNKNOWN IMPORTED)
  set_target_properties(ReshardZstd::zstd PROPERTIES
    IMPORTED_LOCATION "${ReshardZstd_LIBRARY}" INTERFACE_INCLUDE_DIRECTORIES "${ReshardZstd_INCLUDE_DIR}")
endif()
