# SPDX-License-Identifier: BSD-3-Clause
# CTest for programs with multi-process cases (reshard/testing/distributed_test.h).
#
# reshard_discover_distributed_tests(<target> [LABELS label ...] [PREFIX prefix] [RESOURCE_FILE file])
#   Makes every case of the GoogleTest program <target> a ctest test, when ctest runs. From what a distributed case
#   declares follow its labels (cpu or gpu<N>, and ranks<N>), its PROCESSORS, its TIMEOUT (the case's own deadline and half a minute)
#   and, for GPU cases, RESOURCE_GROUPS, so that `ctest -j --resource-spec-file <file>` gives each its own GPUs. Other cases of the program
#   get only LABELS.
#
#   RESOURCE_FILE (default: resources.json in the top build folder; the environment variable RESHARD_RESOURCE_FILE wins) is
#   the file that scripts/write-resource-file writes and ctest gets. A case that needs more GPUs than it lists gets no RESOURCE_GROUPS: ctest
#   would call it `Not Run` and fail, while by itself it skips and says how many GPUs it needs and how many it found.
#
# reshard_add_distributed_test(<name> SOURCES a.cpp ... [LIBRARIES lib ...] [LABELS label ...] [TORCH])
#   For the project itself: a test program like reshard_add_test's, with the fixture linked in (TORCH: the one for LibTorch), discovered as above.

# A cache entry: functions of this module are called from folders that do not see the variables of the one that included it.
set(_reshard_distributed_test_module "${CMAKE_CURRENT_LIST_FILE}" CACHE INTERNAL "")

function(reshard_discover_distributed_tests target)
  cmake_parse_arguments(arg "" "PREFIX;RESOURCE_FILE" "LABELS" ${ARGN})
  if(NOT arg_RESOURCE_FILE)
    set(arg_RESOURCE_FILE "${CMAKE_BINARY_DIR}/resources.json")
  endif()
  set_target_properties(${target} PROPERTIES ENABLE_EXPORTS ON)  # names in the stacks of stuck ranks
  set(base "${CMAKE_CURRENT_BINARY_DIR}/${target}_cases")
  get_property(multi_config GLOBAL PROPERTY GENERATOR_IS_MULTI_CONFIG)
  set(per_config "${base}.cmake")
  if(multi_config)
    set(per_config "${base}_$<CONFIG>.cmake")
    file(WRITE "${base}.cmake" "include(\"${base}_\${CTEST_CONFIGURATION_TYPE}.cmake\" OPTIONAL)\n")
  endif()
  file(GENERATE OUTPUT "${per_config}" CONTENT
"include([==[${_reshard_distributed_test_module}]==])
_reshard_add_cases([==[${target}]==] [==[$<TARGET_FILE:${target}>]==] [==[${arg_PREFIX}]==] [==[${arg_LABELS}]==]
  [==[${arg_RESOURCE_FILE}]==] [==[${CMAKE_CURRENT_BINARY_DIR}]==])
")
  set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES "${base}.cmake")
endfunction()

function(reshard_add_distributed_test name)
  cmake_parse_arguments(arg "TORCH" "" "SOURCES;LIBRARIES;LABELS" ${ARGN})
  add_executable(${name} ${arg_SOURCES})
  reshard_target_defaults(${name})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/tests)
  target_link_libraries(${name} PRIVATE ${arg_LIBRARIES} reshard_testing GTest::gtest GTest::gmock GTest::gtest_main)
  if(arg_TORCH)
    target_link_libraries(${name} PRIVATE reshard_torch_testing)
    reshard_use_torch_pch(${name})
  endif()
  reshard_discover_distributed_tests(${name} LABELS ${arg_LABELS})
endfunction()

# --- run by ctest ----------------------------------------------------------------------------------------------------

# The number of GPUs that the resource file offers.
function(_reshard_gpus_offered file result)
  set(count 0)
  if(NOT "$ENV{RESHARD_RESOURCE_FILE}" STREQUAL "")
    set(file "$ENV{RESHARD_RESOURCE_FILE}")
  endif()
  if(EXISTS "${file}")
    file(READ "${file}" json)
    string(JSON count ERROR_VARIABLE error LENGTH "${json}" local 0 gpus)
    if(error)
      set(count 0)
    endif()
  endif()
  set(${result} "${count}" PARENT_SCOPE)
endfunction()

function(_reshard_add_cases target executable prefix labels resource_file working_dir)
  if(NOT EXISTS "${executable}")
    add_test("${prefix}${target}_NOT_BUILT" "${executable}")
    return()
  endif()
  set(listing "${working_dir}/${target}_cases.txt")
  if("${executable}" IS_NEWER_THAN "${listing}")
    execute_process(COMMAND "${executable}" --gtest_list_tests
      OUTPUT_VARIABLE output ERROR_VARIABLE error RESULT_VARIABLE status TIMEOUT 60)
    if(NOT status STREQUAL "0")
      message(FATAL_ERROR "${executable} --gtest_list_tests failed (${status}):\n${output}${error}")
    endif()
    file(WRITE "${listing}" "${output}")
  endif()
  _reshard_gpus_offered("${resource_file}" offered)

  file(STRINGS "${listing}" lines)
  set(suite "")
  foreach(line IN LISTS lines)
    if(line MATCHES "^([^ ]+)\\.( +#.*)?$")
      set(suite "${CMAKE_MATCH_1}")
    elseif(line MATCHES "^  ([^ #]+)(.*)$" AND suite)
      set(case "${CMAKE_MATCH_1}")
      set(rest "${CMAKE_MATCH_2}")
      set(name "${prefix}${suite}.${case}")
      string(REGEX REPLACE "/DISABLED_|DISABLED_" "" shown "${name}")
      add_test("${shown}" "${executable}" "--gtest_filter=${suite}.${case}" --gtest_also_run_disabled_tests)
      set(properties WORKING_DIRECTORY "${working_dir}" SKIP_REGULAR_EXPRESSION "\\[  SKIPPED \\]")
      if("${suite}.${case}" MATCHES "DISABLED_")
        list(APPEND properties DISABLED TRUE)
      endif()
      set(case_labels ${labels})
      if(rest MATCHES "= ([0-9]+) ranks? on (cpu|([0-9]+) GPUs?) within ([0-9]+) s")
        set(ranks "${CMAKE_MATCH_1}")
        set(gpus "${CMAKE_MATCH_3}")
        math(EXPR timeout "${CMAKE_MATCH_4} + 30")
        list(APPEND case_labels "ranks${ranks}")
        if(gpus STREQUAL "")
          list(APPEND case_labels cpu)
        else()
          list(APPEND case_labels "gpu${gpus}")
          if(gpus LESS_EQUAL offered)
            list(APPEND properties RESOURCE_GROUPS "${gpus},gpus:1")
          endif()
        endif()
        list(APPEND properties PROCESSORS "${ranks}" TIMEOUT "${timeout}")
      endif()
      set_tests_properties("${shown}" PROPERTIES ${properties} LABELS "${case_labels}")
    endif()
  endforeach()
endfunction()
