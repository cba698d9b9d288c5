#!/usr/bin/env bash
# Prints the path of the first Python that is really >= 3.12 and < 3.14 and can make a venv.
#
# Tried in turn: $PYTHON, the names on PATH, pyenv's versions. Each candidate is run and asked,
# because a name proves nothing (a pyenv shim may fail, `python3` may be 3.11, Debian splits venv).
set -u

check='
import sys
if not (3, 12) <= sys.version_info[:2] < (3, 14): sys.exit(1)
import ensurepip, venv
print(sys.executable)
'

try() {
  local found
  found=$("$1" -I -c "$check" 2>/dev/null </dev/null) || return 1
  [ -n "$found" ] && printf '%s\n' "$found"
}

if [ -n "${PYTHON:-}" ]; then
  try "$PYTHON" && exit 0
  echo "find_python: PYTHON=$PYTHON is not a Python >= 3.12 and < 3.14 with venv and ensurepip; looking for another" >&2
fi

for name in python3.12 python3.13 python3 python; do
  command -v "$name" >/dev/null 2>&1 && try "$name" && exit 0
done

roots=()
if command -v pyenv >/dev/null 2>&1; then roots+=("$(pyenv root 2>/dev/null)"); fi
roots+=("${PYENV_ROOT:-}" "${HOME:-}/.pyenv")
for root in "${roots[@]}"; do
  for python in "$root"/versions/3.12*/bin/python "$root"/versions/3.13*/bin/python; do
    [ -x "$python" ] && try "$python" && exit 0
  done
done

echo "find_python: no Python >= 3.12 and < 3.14 with venv and ensurepip on PATH or under pyenv: install Python 3.12 (or set PYTHON=/path/to/python3.12)" >&2
exit 1
