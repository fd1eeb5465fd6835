# SPDX-License-Identifier: BSD-3-Clause
# Finds libdeflate (its checksums are several times as fast as zlib's) and defines ReshardDeflate::deflate. Debian's package has no CMake file.
find_path(ReshardDeflate_INCLUDE_DIR libdeflate.h)
find_library(ReshardDeflate_LIBRARY deflate)
mark_as_advanced(ReshardDeflate_INCLUDE_DIR ReshardDeflate_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ReshardDeflate
  REQUIRED_VARS ReshardDeflate_LIBRARY ReshardDeflate_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "libdeflate is missing: run scripts/setup (or install libdeflate-dev)")

if(ReshardDeflate_FOUND AND NOT TARGET ReshardDeflate::deflate)
  add_library(ReshardDeflate::deflate UNKNOWN IMPORTED)
  set_target_properties(ReshardDeflate::deflate PROPERTIES
    IMPORTED_LOCATION "${ReshardDeflate_LIBRARY}" INTERFACE_INCLUDE_DIRECTORIES "${ReshardDeflate_INCLUDE_DIR}")
endif()
