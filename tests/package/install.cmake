# SPDX-License-Identifier: BSD-3-Clause
# Makes PREFIX what installing BUILD gives. Installed files keep the time of their source, which may be older than what the outside project
# made with the version before; so files that differ are copied anew, the others stay untouched, and what is no longer installed goes.
cmake_minimum_required(VERSION 3.25)
set(fresh "${PREFIX}.fresh")
file(REMOVE_RECURSE "${fresh}")
execute_process(COMMAND ${CMAKE_COMMAND} --install "${BUILD}" --prefix "${fresh}" OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)

file(GLOB_RECURSE files RELATIVE "${fresh}" "${fresh}/*")
foreach(file IN LISTS files)
  get_filename_component(folder "${PREFIX}/${file}" DIRECTORY)
  file(MAKE_DIRECTORY "${folder}")
  file(COPY_FILE "${fresh}/${file}" "${PREFIX}/${file}" ONLY_IF_DIFFERENT)
endforeach()
file(GLOB_RECURSE before RELATIVE "${PREFIX}" "${PREFIX}/*")
foreach(file IN LISTS before)
  if(NOT file IN_LIST files)
    file(REMOVE "${PREFIX}/${file}")
  endif()
endforeach()
file(REMOVE_RECURSE "${fresh}")
