# Sourced by the other scripts: where moeconv is installed, with its pins and a Python 3.12.
#
# Each job has an environment of its own. torch brings NVIDIA's CUDA 13 libraries and JAX those of
# CUDA 12, in packages of other names that write the same files (nvidia/cudnn/lib/libcudnn.so.9):
# in one environment the last one wins. Beside that, torch costs MaxText 16 s and 0.8 GB.

# Kaggle's image sets these for its own packages, with files that only it has, or that point uv and
# pip elsewhere than into the environment named here.
unset UV_CONSTRAINT UV_BUILD_CONSTRAINT UV_OVERRIDE UV_EXCLUDE_NEWER UV_PYTHON UV_TARGET \
  PIP_CONSTRAINT PIP_BUILD_CONSTRAINT PIP_REQUIREMENT PIP_TARGET PIP_PREFIX PIP_USER \
  PYTHONPATH PYTHONHOME
# The image's CUDA toolkit is older than the pinned libraries, and would be loaded before them. The
# driver's folder (/usr/local/nvidia/lib64) stays.
LD_LIBRARY_PATH=$(tr : '\n' <<<"${LD_LIBRARY_PATH:-}" | { grep -vE '/cuda[^/]*(/|$)' || true; } |
  paste -sd :)
export LD_LIBRARY_PATH
[ -n "$LD_LIBRARY_PATH" ] || unset LD_LIBRARY_PATH

make_env() { # make_env DIR EXTRA...: moeconv[EXTRA,...] in DIR, unless it is there already
  local dir=$1 here copy pins=dev extras done=0
  shift
  if [ -x "$dir/bin/moeconv" ]; then
    return 0
  fi
  extras=" $* "
  if [[ $extras == *" cuda12 "* ]]; then
    pins=kaggle
    if [[ $extras == *" verify "* ]]; then
      echo "make_env: verify (torch) and cuda12 do not go into one environment" >&2
      return 2
    fi
  fi
  extras=$(IFS=,; echo "$*")
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  echo "== installing moeconv${extras:+[$extras]} into $dir"
  # A copy, as Kaggle's inputs cannot be written to and a build leaves files behind.
  copy=$(mktemp -d)
  [ ! -f "$dir/pyvenv.cfg" ] || rm -rf "$dir" # of an installation that broke off
  cp -r "$here"/{pyproject.toml,README.md,LICENSE,moeconv,train,requirements} "$copy" &&
    python3 -m pip install --quiet --require-hashes -r "$copy/requirements/uv.txt" &&
    make_venv "$dir" &&
    python3 -m uv pip install --quiet --python "$dir" \
      --constraint "$copy/requirements/$pins.txt" "$copy${extras:+[$extras]}" || done=$?
  rm -rf "$copy"
  if [ "$done" != 0 ]; then
    rm -f "$dir/bin/moeconv" # half an environment would be taken for a whole one
    echo "$dir: moeconv could not be installed; what pip or uv said is above" >&2
  fi
  return "$done"
}

make_venv() { # with a Python 3.12 of uv's own: the image's runs its sitecustomize in every command
  python3 -m uv venv --quiet --managed-python --python 3.12 "$1" || {
    echo "== uv can fetch no Python; taking one of this machine" >&2
    python3 -m uv venv --quiet --python 3.12 "$1"
  }
}
