#!/usr/bin/env bash
# A finished run to the Hugging Face Hub: convert, verify, push.
#
#   HF_TOKEN=… export_to_hub.sh RUN_DIR [REPO_ID] [options of moeconv push]
#
# RUN_DIR is the run's folder (with checkpoints/ in it). REPO_ID is NAMESPACE/NAME; without it the
# model goes where the run's config says. The model is made in RUN_DIR-hf, or in $MOECONV_OUT; a
# README.md, LICENSE or NOTICE that lies there is kept. Nothing is pushed that is not verified. All of
# it can be repeated: what the Hub has is not sent again.
#
# To verify, MaxText and torch must be in one environment, which that of a training on GPUs is not:
# their CUDA libraries exclude each other. $PYTHON is the Python of an environment with moeconv and its
# extras train and verify; without it that of $EXPORT_VENV (~/.moeconv-export-venv), of $VENV
# (~/.moeconv-venv, of kaggle_train.sh) or the `python` of this shell, the first that has both; if
# none has, $EXPORT_VENV is made.
set -euo pipefail

usage() {
  sed -nE '2,/^set /s/^# ?//p' "$0"
}

die() {
  echo "export_to_hub.sh: $1" >&2
  exit "${2:-2}"
}

case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  "" | -*)
    usage >&2
    exit 2
    ;;
esac

run=${1%/}
shift
repo=()
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  repo=(--repo-id "$1")
  shift
fi

[ -d "$run" ] || die "there is no run directory $run"
[ -d "$run/checkpoints" ] || die "$run has no checkpoints/; give the run's own directory"
# Before the work, not after it.
[ -n "${HF_TOKEN:-}" ] || die "HF_TOKEN is not set; on Kaggle, add it to the notebook's secrets and
export it: os.environ['HF_TOKEN'] = UserSecretsClient().get_secret('HF_TOKEN')"

out=${MOECONV_OUT:-$run-hf}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/environment.sh"
env=${EXPORT_VENV:-$HOME/.moeconv-export-venv}
scratch=$(mktemp -d)

# What people put beside the model, and convert would replace along with it.
kept="README.md LICENSE LICENSE.md LICENSE.txt NOTICE"

put_back() { # never over a file that lies there
  local name
  for name in $kept; do
    if [ -f "$scratch/$name" ] && [ ! -e "$out/$name" ]; then
      mkdir -p "$out" && cp -p "$scratch/$name" "$out/$name" || return 1
    fi
  done
}

leave() {
  if put_back; then
    rm -rf "$scratch"
  else
    echo "export_to_hub.sh: what lay in $out (README, LICENSE, …) is kept in $scratch" >&2
  fi
}
trap leave EXIT

fits() { # whether a Python has all that is needed; looked for, not imported
  "$1" -c '
import importlib.util, sys
names = "moeconv", "maxtext", "torch", "transformers"
sys.exit(any(importlib.util.find_spec(name) is None for name in names))' 2>/dev/null
}

advice="make one in a checkout of moeconv, python3 -m venv DIR && DIR/bin/pip install '.[train,verify]', and set PYTHON=DIR/bin/python"
if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
  fits "$python" || die "PYTHON=$python is not of an environment with moeconv, MaxText, torch and transformers; $advice"
else
  python=
  for candidate in "$env/bin/python" "${VENV:-$HOME/.moeconv-venv}/bin/python" python; do
    if fits "$candidate"; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    [ -f "$here/../../pyproject.toml" ] ||
      die "no environment has moeconv, MaxText, torch and transformers, and this script lies in no checkout to install them from; $advice"
    make_env "$env" train verify
    python=$env/bin/python
    fits "$python" || die "$env was made without MaxText, torch or transformers; remove it and run this again"
  fi
fi
moeconv() {
  "$python" -m moeconv.cli.main "$@"
}

for name in $kept; do
  if [ -f "$out/$name" ]; then
    cp -p "$out/$name" "$scratch/$name"
    echo "==> $name in $out is put back after convert"
  fi
done

echo "==> convert $run -> $out"
moeconv convert "$run" "$out" --overwrite --resume
put_back

echo "==> verify $out"
code=0
moeconv verify "$out" || code=$?
case $code in
  0) ;;
  1) die "the converted model is not the one that was trained; see $out/verify.md. Nothing was pushed." 1 ;;
  *) die "there is no verdict, so nothing was pushed; mend what verify says and run this again" "$code" ;;
esac

echo "==> push $out"
push=("$python" -m moeconv.cli.main push "$out" ${repo[@]+"${repo[@]}"} "$@")
"${push[@]}" || {
  code=$?
  die "the push failed; when that is mended, go on with: $(printf '%q ' "${push[@]}")" "$code"
}
