#!/usr/bin/env bash
# Pins what pyproject.toml and the consumers of tests/consumers ask for, with hashes, into
# requirements/. Arguments go to uv (`--upgrade`, `--upgrade-package NAME`); without them the pins
# that still fit stay.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}

# Only the registry that uv uses by itself: a mirror or a local index would leave its own hashes.
unset UV_INDEX UV_INDEX_URL UV_DEFAULT_INDEX UV_EXTRA_INDEX_URL UV_FIND_LINKS UV_CONFIG_FILE

platform=--universal

pin() { # pin NAME SOURCE [uv arguments]
  local out=requirements/$1.txt
  "$uv" --no-config pip compile --quiet $platform --python-version 3.12 --generate-hashes \
    --no-header --no-emit-index-url --no-emit-find-links --annotation-style line \
    "${@:3}" "$2" -o "$out"
  { echo "# Made by \`make pins\`; do not edit."; grep -v '^# Made by' "$out"; } >"$out.new"
  mv "$out.new" "$out"
  echo "$out: $(grep -c '==' "$out") packages"
}

pin dev pyproject.toml --extra verify --extra train --extra dev "$@"
pin convert pyproject.toml --constraint requirements/dev.txt "$@"
echo uv | pin uv - "$@"
# The plugin must be of jax's own version.
sed -n 's/^jax==\([^ ]*\).*/jax-cuda12-plugin==\1/p' requirements/dev.txt | pin cuda-plugin - "$@"
for source in requirements/consumers/*.in; do
  pin "consumers/$(basename "$source" .in)" "$source" "$@"
done
# Training on Kaggle, without torch: its CUDA libraries are of another version (kaggle/environment.sh).
platform=--python-platform=x86_64-manylinux_2_28
pin kaggle pyproject.toml --extra train --extra cuda12 --constraint requirements/dev.txt "$@"
