#!/usr/bin/env bash
# One Kaggle session of a run: install, take up the last session's output, check, train, save.
#
#   kaggle_train.sh [RECIPE|FILE.yml] [key=value ...]      (what `moeconv train` takes)
#
# Secrets come from the environment only: HF_TOKEN, WANDB_API_KEY. docs/kaggle.md has the rest.
#
#   SESSION   what the session may take in all, from the start of this script (11h30m: Kaggle ends
#             GPU sessions after 12 h, and the last save and the output need some minutes)
#   WORK      what Kaggle keeps as the notebook's output (/kaggle/working)
#   INPUT     where the last session's output is attached (/kaggle/input)
#   VENV      where moeconv is installed; not below WORK, it would be saved (~/.moeconv-venv)
#   CHECK     0 leaves out `--check`, which takes about two minutes (1)
set -euo pipefail

for word in "$@"; do
  case $word in
    -h | --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
  esac
done

session=${SESSION:-11h30m}
work=${WORK:-/kaggle/working}
input=${INPUT:-/kaggle/input}
venv=${VENV:-$HOME/.moeconv-venv}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

say() { echo "== $*"; }

seconds_of() { # 8h30m, 45m or 90s
  [[ $1 =~ ^(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?$ && -n $1 ]] || return 1
  echo $((${BASH_REMATCH[2]:-0} * 3600 + ${BASH_REMATCH[4]:-0} * 60 + ${BASH_REMATCH[6]:-0}))
}
limit=$(seconds_of "$session") || { echo "SESSION=$session: write it as 11h30m" >&2; exit 2; }

if [ ! -x "$venv/bin/moeconv" ]; then
  say "installing moeconv and MaxText into $venv"
  # A copy, as Kaggle's inputs cannot be written to and a build leaves files behind.
  source=$(mktemp -d)
  trap 'rm -rf "$source"' EXIT
  cp -r "$here/." "$source"
  python3 -m pip install --quiet uv
  python3 -m uv venv --quiet --python 3.12 "$venv"
  python3 -m uv pip install --quiet --python "$venv" --constraint "$source/requirements/dev.txt" \
    "$source[train,verify,cuda12]"
fi
moeconv=$venv/bin/moeconv

# The last session's output, wherever it is attached: its runs and its prepared data. What is in
# WORK already is newer.
if [ ! -e "$work/runs" ] && [ -d "$input" ]; then
  last=$(find -L "$input" -maxdepth 6 -type d -path '*/runs/data' -prune -o -name moeconv.json \
    -path '*/runs/*' -printf '%T@ %h\n' 2>/dev/null | sort -n | tail -1 | cut -d' ' -f2-)
  if [ -n "$last" ]; then
    say "going on from $(dirname "$last")"
    mkdir -p "$work/runs.partial"
    cp -rL "$(dirname "$last")/." "$work/runs.partial"
    chmod -R u+w "$work/runs.partial"
    mv "$work/runs.partial" "$work/runs"
  fi
fi

cd "$work"
if [ "${CHECK:-1}" != 0 ]; then
  say "checking"
  "$moeconv" train --check "$@"
fi

left=$((limit - SECONDS))
[ "$left" -gt 0 ] || { echo "SESSION=$session is over before training began" >&2; exit 2; }
say "training for at most $left s"
code=0
"$moeconv" train "$@" --time-limit "${left}s" || code=$?
if [ "$code" = 14 ]; then
  say "not finished: attach this notebook's output to it as an input, and run it again"
  exit 0
fi
[ "$code" = 0 ] && say "finished: train/kaggle/export_to_hub.sh RUN_DIR converts, verifies and pushes"
exit "$code"
