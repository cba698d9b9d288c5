# Sourced by the other scripts: where moeconv is installed, with its pins and a Python 3.12.
#
# Each job has an environment of its own. torch brings NVIDIA's CUDA 13 libraries and JAX those of
# CUDA 12, in packages of other names that write the same files (nvidia/cudnn/lib/libcudnn.so.9):
# in one environment the last one wins. Beside that, torch costs MaxText 16 s and 0.8 GB.

# Kaggle's image sets these for its own packages, with files that only it has, or that point uv and
# pip elsewhere than into the environment named here. How to reach an index is left to them.
unset PYTHONPATH PYTHONHOME PYTHONUSERBASE FORCE_COLOR CLICOLOR_FORCE $(compgen -e | grep -E '^(UV|PIP)_' |
  grep -vE 'INDEX|FIND_LINKS|HOST|CERT|TLS|PROXY|KEYRING|TIMEOUT|RETRIES|CACHE|MIRROR|CONFIG_FILE')
# The image's CUDA toolkit is older than the pinned libraries, and would be loaded before them. The
# driver's folder (/usr/local/nvidia/lib64) stays.
LD_LIBRARY_PATH=$(tr : '\n' <<<"${LD_LIBRARY_PATH:-}" | { grep -vE '/cuda[^/]*(/|$)' || true; } |
  paste -sd :)
export LD_LIBRARY_PATH
[ -n "$LD_LIBRARY_PATH" ] || unset LD_LIBRARY_PATH

make_env() { # make_env DIR EXTRA...: moeconv[EXTRA,...] in DIR, unless it is there already
  local dir=$1 here copy uv pins=dev extras done=0
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
  # A copy, as Kaggle's inputs cannot be written to and a build leaves files behind. uv lies beside
  # it: the image's Python may be managed by its system, and is not ours to change.
  copy=$(mktemp -d)
  uv=$copy/uv/bin/uv
  [ ! -f "$dir/pyvenv.cfg" ] || rm -rf "$dir" # of an installation that broke off
  cp -r "$here"/{pyproject.toml,README.md,LICENSE,moeconv,train,requirements} "$copy" &&
    chmod -R u+w "$copy" &&
    python3 -m pip --disable-pip-version-check install --quiet --root-user-action ignore \
      --require-hashes --target "$copy/uv" -r "$copy/requirements/uv.txt" &&
    make_venv "$uv" "$dir" &&
    "$uv" pip install --quiet --python "$dir" \
      --constraint "$copy/requirements/$pins.txt" "$copy${extras:+[$extras]}" || done=$?
  rm -rf "$copy"
  if [ "$done" != 0 ]; then
    rm -f "$dir/bin/moeconv" # half an environment would be taken for a whole one
    echo "$dir: moeconv could not be installed; what pip or uv said is above. If they cannot download, \
turn the network on (Kaggle: Settings -> Internet), and run this again" >&2
  fi
  return "$done"
}

make_venv() { # make_venv UV DIR, with the first Python that there is
  # uv's own first: the image's runs its sitecustomize in every command. The pins are for 3.12, and
  # have the same packages for 3.13.
  "$1" venv --quiet --managed-python --python 3.12 "$2" && return
  echo "== uv can fetch no Python; taking one of this machine" >&2
  "$1" venv --quiet --no-managed-python --python 3.12 "$2" 2>/dev/null && return
  "$1" venv --quiet --no-managed-python --python 3.13 "$2" 2>/dev/null && return
  echo "$2: needs Python 3.12 or 3.13. uv could not fetch it (what it said is above), and this machine \
has only $(python3 --version 2>&1): turn the network on, as uv fetches it from github.com, or install \
python3.12 and run this again" >&2
  return 1
}
