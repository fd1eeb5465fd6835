# SPDX-License-Identifier: BSD-3-Clause
# Helpers that give every target of the project the same language level, warnings and sanitizers.

function(reshard_target_defaults target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE ON)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual
                                           $<$<BOOL:${RESHARD_WARNINGS_AS_ERRORS}>:-Werror>)
  # At -O3 and under sanitizers GCC 12 sees overlaps, overflows and uninitialised memory inside std::string and std::vector that are not there (its bug 105651 and kin).
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    set(sanitized 0)  # the option's commas would end the expression's first part
    if(RESHARD_SANITIZE)
      set(sanitized 1)
    endif()
    target_compile_options(${target} PRIVATE "$<$<OR:$<NOT:$<CONFIG:Debug>>,${sanitized}>:-Wno-restrict;-Wno-stringop-overflow;-Wno-maybe-uninitialized;-Wno-free-nonheap-object;-Wno-array-bounds>")
  endif()
  if(RESHARD_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${RESHARD_SANITIZE} -fno-omit-frame-pointer
                                             -fno-sanitize-recover=all)
    target_link_options(${target} PUBLIC -fsanitize=${RESHARD_SANITIZE})
  endif()
endfunction()

# reshard_add_library(<target> <exported name>): a library known as reshard::<exported name>, in the build tree and
# after installation alike. Rooms add their files with target_sources.
function(reshard_add_library target exported)
  add_library(${target})
  add_library(reshard::${exported} ALIAS ${target})
  reshard_target_defaults(${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${exported})
  target_include_directories(${target} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
                                              $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>
                                       PRIVATE ${PROJECT_SOURCE_DIR}/src)
endfunction()

# reshard_use_torch_pch(<target>): the precompiled LibTorch headers of the library, made once for all (half a minute and hundreds of MB each).
# GCC takes a precompiled header only under the flags that it was made with, so programs, too, are compiled with -fPIC rather than -fPIE.
function(reshard_use_torch_pch target)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
  target_compile_options(${target} PRIVATE -fPIC)
  target_precompile_headers(${target} REUSE_FROM reshard)
endfunction()

# reshard_add_test(<name> SOURCES a.cpp ... [LIBRARIES lib ...] [LABELS label ...] [TORCH])
# A GoogleTest program whose every case is a ctest test. TORCH: it includes LibTorch headers (precompiled header reused).
function(reshard_add_test name)
  cmake_parse_arguments(arg "TORCH" "" "SOURCES;LIBRARIES;LABELS" ${ARGN})
  foreach(source IN LISTS arg_SOURCES)
    if(NOT EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/${source}" AND NOT EXISTS "${source}")
      message(WARNING "${name}: ${source} is not there yet")
      list(REMOVE_ITEM arg_SOURCES "${source}")
    endif()
  endforeach()
  if(NOT arg_SOURCES)
    return()
  endif()
  add_executable(${name} ${arg_SOURCES})
  reshard_target_defaults(${name})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/tests)
  target_link_libraries(${name} PRIVATE ${arg_LIBRARIES} GTest::gtest GTest::gmock GTest::gtest_main)
  if(arg_TORCH)
    reshard_use_torch_pch(${name})
  endif()
  include(GoogleTest)
  gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST PROPERTIES LABELS "${arg_LABELS}" TIMEOUT 300)
endfunction()
