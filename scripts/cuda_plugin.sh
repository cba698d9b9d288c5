#!/usr/bin/env bash
# Puts JAX's CUDA plugin, which compiles for a GPU that need not be there, into a directory of its
# own: in the environment itself, without a driver, `import jax` would try it and may crash.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: cuda_plugin.sh PYTHON DIRECTORY}
directory=${2:?usage: cuda_plugin.sh PYTHON DIRECTORY}
pins=requirements/cuda-plugin.txt

if [ "$(uname -s)" != Linux ]; then
  echo "cuda-plugin: none for $(uname -s); what compiles for a GPU is skipped" >&2
  exit 0
fi
echo "cuda-plugin: installing $pins (201 MB to download when no cache has it)"
rm -rf "$directory"
if ! "${python%/*}/uv" pip install --quiet --python "$python" --target "$directory" \
  --no-deps --require-hashes -r "$pins"; then
  echo "cuda-plugin: uv cannot install here; pip tries" >&2
  "$python" -m pip --disable-pip-version-check install -qq --target "$directory" \
    --no-deps --require-hashes -r "$pins"
fi
