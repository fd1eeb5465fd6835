#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Fails if a program or shared library of the build folder $1 defines a symbol of gloo's. Gloo's headers are older than the gloo inside LibTorch
# and must stay declarations to us: a definition of ours could take the place of LibTorch's.
set -euo pipefail
found=0 looked=0
for file in "$1"/bin/* "$1"/lib/*.so; do
  [ -f "$file" ] && [ "$(head -c 4 "$file" | tail -c 3)" = ELF ] || continue
  looked=$((looked + 1))
  symbols=$(nm -DC --defined-only "$file" | awk '{ $1 = ""; $2 = ""; print }' | grep -E '(^| )(vtable for |typeinfo for |typeinfo name for )?(gloo::|c10d::GlooStore)' || true)
  if [ -n "$symbols" ]; then
    printf '%s defines:\n%s\n' "$file" "$symbols"
    found=1
  fi
done
[ "$looked" -gt 0 ] || { echo "no program found below $1"; exit 1; }
exit "$found"
