# SPDX-License-Identifier: BSD-3-Clause
# Install rules: the libraries, their headers, and the package files that make find_package(reshard) work elsewhere.
include(CMakePackageConfigHelpers)
set(_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/reshard")

set(_targets "")
foreach(target reshard_core reshard_launch reshard reshard_testing)
  if(TARGET ${target})
    list(APPEND _targets ${target})
  endif()
endforeach()
install(TARGETS ${_targets} EXPORT reshardTargets)
install(EXPORT reshardTargets NAMESPACE reshard:: DESTINATION "${_package_dir}")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/reshard" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
