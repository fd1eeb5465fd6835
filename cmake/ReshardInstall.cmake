# SPDX-License-Identifier: BSD-3-Clause
# Install rules: libraries, headers, and the package files that make find_package(reshard) work elsewhere. (The command
# line installs itself, in its own room.)
#
# Four export sets, one a component, so that a program that wants reshard::core alone needs neither LibTorch nor GoogleTest nor libcurl.
include(CMakePackageConfigHelpers)
set(_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/reshard")

set(_core_targets reshard_core reshard_launch)
set(_s3_targets reshard_s3)
set(_reshard_targets reshard)
set(_testing_targets reshard_testing reshard_torch_testing)
set(reshard_COMPONENTS "")
foreach(component core s3 reshard testing)
  set(_present "")
  foreach(target IN LISTS _${component}_targets)
    if(TARGET ${target})
      list(APPEND _present ${target})
    endif()
  endforeach()
  if(_present)
    list(APPEND reshard_COMPONENTS ${component})
    install(TARGETS ${_present} EXPORT reshard_${component}
      ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
    install(EXPORT reshard_${component} NAMESPACE reshard:: FILE reshard_${component}.cmake DESTINATION "${_package_dir}")
  endif()
endforeach()

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/reshard" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")

if(TARGET reshard_cuda)
  # Not linked but opened at run time, by its plain name: the folder is on the run path of every program that uses reshard::reshard.
  set_target_properties(reshard_cuda PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
  install(TARGETS reshard_cuda LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
  target_link_options(reshard INTERFACE "$<INSTALL_INTERFACE:-Wl,-rpath,$<INSTALL_PREFIX>/${CMAKE_INSTALL_LIBDIR}>")
endif()

configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/reshardConfig.cmake.in" "${PROJECT_BINARY_DIR}/reshardConfig.cmake"
  INSTALL_DESTINATION "${_package_dir}" NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/reshardConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES
  "${PROJECT_BINARY_DIR}/reshardConfig.cmake"
  "${PROJECT_BINARY_DIR}/reshardConfigVersion.cmake"
  "${CMAKE_CURRENT_LIST_DIR}/FindReshardDeflate.cmake"
  "${CMAKE_CURRENT_LIST_DIR}/FindReshardZstd.cmake"
  DESTINATION "${_package_dir}")
if(TARGET reshard)
  install(FILES "${CMAKE_CURRENT_LIST_DIR}/FindReshardTorch.cmake" DESTINATION "${_package_dir}")
endif()
if(TARGET reshard_testing AND EXISTS "${CMAKE_CURRENT_LIST_DIR}/ReshardDistributedTest.cmake")
  install(FILES "${CMAKE_CURRENT_LIST_DIR}/ReshardDistributedTest.cmake" DESTINATION "${_package_dir}")
endif()
