#!/usr/bin/env bash
# A finished run to the Hugging Face Hub: convert, verify, push.
#
#   HF_TOKEN=… export_to_hub.sh RUN_DIR [REPO_ID] [options of moeconv push]
#
# RUN_DIR is the run's folder (with checkpoints/ in it). REPO_ID is NAMESPACE/NAME; without it the
# model goes where the run's config says. The model is made in RUN_DIR-hf, or in $MOECONV_OUT; a
# README.md that lies there is kept. Nothing is pushed that is not verified. Every step can be
# repeated: what the Hub has is not sent again. $PYTHON is the Python that moeconv is installed in;
# otherwise that of kaggle_train.sh (VENV), if it was used, or the `python` of this shell.
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
python=${PYTHON:-${VENV:-$HOME/.moeconv-venv}/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python
"$python" -c 'import moeconv' 2>/dev/null ||
  die "moeconv is not installed in $python; run kaggle_train.sh first, or set PYTHON to the Python it is in"
moeconv() {
  "$python" -m moeconv.cli.main "$@"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
readme=
if [ -f "$out/README.md" ]; then
  cp -p "$out/README.md" "$scratch/README.md"
  readme=$scratch/README.md
fi

echo "==> convert $run -> $out"
moeconv convert "$run" "$out" --overwrite --resume
[ -z "$readme" ] || cp -p "$readme" "$out/README.md"

echo "==> verify $out"
code=0
moeconv verify "$out" || code=$?
case $code in
  0) ;;
  1) die "the converted model is not the one that was trained; see $out/verify.md. Nothing was pushed." 1 ;;
  *) die "there is no verdict, so nothing was pushed; mend what verify says and run this again" "$code" ;;
esac

echo "==> push $out"
moeconv push "$out" ${repo[@]+"${repo[@]}"} "$@" || {
  code=$?
  die "the push failed; when that is mended, go on with: moeconv push $out ${repo[*]:-}" "$code"
}
