#!/usr/bin/env bash
# Makes VENV and installs the pinned requirements, each file checked against its hash.
#
# uv does it several times faster than pip, so pip first fetches uv; where uv cannot work, pip does
# the rest too. Running it again repairs an unfinished VENV without starting over.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:?usage: make_venv.sh VENV REQUIREMENTS}
requirements=${2:?usage: make_venv.sh VENV REQUIREMENTS}
python=$venv/bin/python

right_version='import sys, pip; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))'
if ! "$python" -c "$right_version" >/dev/null 2>&1; then
  base=$(scripts/find_python.sh)
  echo "venv: making $venv with $("$base" --version) ($base)"
  rm -rf "$venv"
  "$base" -m venv "$venv"
fi

with_pip() {
  "$python" -m pip --disable-pip-version-check install -qq --require-hashes -r "$1"
}
with_uv() { # its progress bars only where someone watches
  local quiet=--quiet
  [ -t 2 ] && quiet=
  "$venv/bin/uv" pip install $quiet --python "$python" --require-hashes -r "$1"
}

echo "venv: installing $requirements (3.5 GB to download when no cache has it: torch and CUDA)"
if ! { with_pip requirements/uv.txt && with_uv "$requirements"; }; then
  echo "venv: uv cannot install here; pip goes on, which takes some minutes more" >&2
  with_pip "$requirements"
fi
