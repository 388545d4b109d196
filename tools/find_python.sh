#!/usr/bin/env bash
# Prints the newest Python >= 3.11 that can make a virtual environment, or with an argument (3.11) that version only.
set -eu

versions="${1:-3.14 3.13 3.12 3.11}"

candidates() {
  local version=$1
  type -ap "python$version" || true
  if command -v pyenv >/dev/null; then
    ls -d "$(pyenv root)"/versions/*/bin/"python$version" 2>/dev/null || true
  fi
  type -ap python3 python || true
}

# A pyenv shim on PATH may stand for a version that is not active, so every candidate is run before it is chosen.
check='import sys, venv, ensurepip
if "%d.%d" % sys.version_info[:2] == sys.argv[1] and sys.implementation.name == "cpython": print(sys.executable)'

for version in $versions; do
  while read -r candidate; do
    found=$("$candidate" -c "$check" "$version" 2>/dev/null) || continue
    if [ -n "$found" ]; then
      echo "$found"
      exit 0
    fi
  done < <(candidates "$version")
done

echo "find_python.sh: found no Python out of: $versions (with the venv module). Install one, or set PYTHON." >&2
exit 1
