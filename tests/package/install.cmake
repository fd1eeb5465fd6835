# SPDX-License-Identifier: BSD-3-Clause
# Installs BUILD into PREFIX, which is emptied first: a file that is no longer installed must not linger.
file(REMOVE_RECURSE "${PREFIX}")
execute_process(COMMAND ${CMAKE_COMMAND} --install "${BUILD}" --prefix "${PREFIX}" OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
