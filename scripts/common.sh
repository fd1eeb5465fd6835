# SPDX-License-Identifier: BSD-3-Clause
# Sourced by the other scripts: where things are, and how to speak.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
cd "$root"
# Tools that setup had to put into .venv (clang-format, a newer CMake) come before the system's.
PATH="$venv/bin:$PATH"
jobs=${RESHARD_JOBS:-$(nproc)}

say() { printf '%s\n' "-- $*"; }
die() { printf '%s\n' "error: $*" >&2; exit 1; }

# True where CMAKE_PREFIX_PATH names a LibTorch of the user's own.
has_own_libtorch() {
  local prefix dir
  local IFS=':;'
  for prefix in ${CMAKE_PREFIX_PATH:-}; do
    for dir in "$prefix" "$prefix/torch" "$prefix/libtorch"; do
      [ -e "$dir/lib/libtorch_cpu.so" ] && return 0
    done
  done
  return 1
}
