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
#   AT_LEAST  the step that the last session's output must have reached: an older one is refused
#   NEW       1 begins a new run although another run's output is attached
#   CHECK     0 leaves out `--check`, which compiles the step once more: half a minute on two
#             cores, not timed on Kaggle (1)
#   TRIAL     0 leaves out the trial of a new run: a few minutes in which the stock step and the
#             patched one are timed and compared here, and the better one is kept (1)
set -euo pipefail

for word in "$@"; do
  case $word in
    -h | --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    base_output_directory=*)
      echo "$word: what Kaggle keeps lies in WORK; set WORK instead" >&2
      exit 2
      ;;
  esac
done

# A notebook gives its commands a terminal, where the progress line is rewritten at every step: that
# is megabytes of output by the end. Into a pipe it is a line every ten seconds.
if [ -t 1 ]; then
  bash "${BASH_SOURCE[0]}" "$@" 2>&1 | (trap '' INT; exec cat)
  exit
fi

session=${SESSION:-11h30m}
work=${WORK:-/kaggle/working}
input=${INPUT:-/kaggle/input}
venv=${VENV:-$HOME/.moeconv-venv}
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# Host buffers of NCCL fail on GPUs that cannot read each other's memory, as these T4s (nccl#1838).
export NCCL_CUMEM_HOST_ENABLE=${NCCL_CUMEM_HOST_ENABLE:-0}

say() { echo "== $*"; }
refuse() {
  echo "$*" >&2
  exit 2
}

seconds_of() { # 8h30m, 45m or 90s
  [[ $1 =~ ^(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?$ && -n $1 ]] || return 1
  # 10#: bash takes 09 for octal.
  echo $((10#${BASH_REMATCH[2]:-0} * 3600 + 10#${BASH_REMATCH[4]:-0} * 60 + 10#${BASH_REMATCH[6]:-0}))
}
[[ ${AT_LEAST:-0} =~ ^[0-9]+$ ]] || refuse "AT_LEAST=$AT_LEAST: write it as a step, 11540"
limit=$(seconds_of "$session") || { echo "SESSION=$session: write it as 11h30m" >&2; exit 2; }

# Without torch, which MaxText does not need and whose CUDA libraries are not JAX's.
make_env "$venv" train cuda12
moeconv=$venv/bin/moeconv
words=("$@" "base_output_directory=$work/runs")

run_name() { # of the run that these words mean, which a recipe may name
  local plan
  plan=$("$moeconv" train "${words[@]}" --dry-run --json) || return
  # An image's sitecustomize may print before the JSON and behind it; -S runs none here.
  python3 -I -S -c 'if True:
    import json, os, re, sys
    text = sys.stdin.read()
    begin = re.search(r"\{\s*\"plan\":", text).start()
    plan = json.JSONDecoder().raw_decode(text, begin)[0]["plan"]
    print(os.path.basename(plan["run_dir"]))' <<<"$plan"
}

# What is attached below INPUT; at most `notebooks/OWNER/NAME/VERSION/FOLDER/runs/RUN/moeconv_run.json`.
# (moeconv.json: of moeconv 0.1.0, whose models have a file of that name, too.)
attached() { # attached GLOB: runs of that name, each once
  local found run
  { find -L "$input" -maxdepth 9 -type d -path '*/runs/data' -prune -o -type f \
    \( -path "*/runs/$1/moeconv_run.json" -o -path "*/runs/$1/moeconv.json" \) -print 2>/dev/null ||
    true; } |
    while IFS= read -r found; do
      run=$(dirname "$found")
      [ -e "$run/config.json" ] || echo "$run"
    done | sort -u
}
last_step() { # last_step RUN: of its highest whole checkpoint; -1 where it has none
  local each step last=-1
  for each in "$1"/checkpoints/*/items/_METADATA; do
    step=$(basename "${each%/items/_METADATA}")
    [[ $step =~ ^(0|[1-9][0-9]*)$ && $step -gt $last ]] && last=$step
  done
  echo "$last"
}
# The last session's output, wherever it is attached: its runs and its prepared data. Of several
# the one that is furthest: files that Kaggle attaches do not keep their times. What is in WORK
# already is newer.
last_run() { # last_run NAME: that with the highest checkpoint
  local run
  attached "$1" | while IFS= read -r run; do
    printf '%s %s\n' "$(last_step "$run")" "$run"
  done | sort -n | tail -1 | cut -d' ' -f2-
}
take() { # take DIR...: copies in WORK/runs, all whole or none; of checkpoints the last
  local from to step
  rm -rf "$work/runs.partial"
  for from in "$@"; do
    to=$work/runs.partial/$(basename "$from") step=$(last_step "$from")
    mkdir -p "$to"
    find -L "$from" -mindepth 1 -maxdepth 1 ! -name checkpoints -exec cp -rL -t "$to" {} +
    if [ "$step" != -1 ]; then
      mkdir "$to/checkpoints"
      cp -rL "$from/checkpoints/$step" "$to/checkpoints"
    fi
  done
  chmod -R u+w "$work/runs.partial"
  mv "$work/runs.partial" "$work/runs"
}
name=$(run_name)
run=$work/runs/$name
if [ ! -e "$work/runs" ]; then
  last=$(last_run "$name")
  data=${last:+$(dirname "$last")/data}
  if [ ! -d "$data" ]; then
    data=$({ find -L "$input" -maxdepth 8 -type d -path '*/runs/data' 2>/dev/null || true; } |
      sort | tail -1)
  fi
  if [ -n "$last" ]; then
    step=$(last_step "$last")
    if [ -n "${AT_LEAST:-}" ] && [ "$step" -lt "$AT_LEAST" ]; then
      refuse "the furthest run $name attached below $input has reached step $step, and AT_LEAST=$AT_LEAST
asks for more: an attached notebook stays at the version it was attached at. Attach the newest
version of its output (Input -> check for updates), or lower AT_LEAST"
    fi
    say "going on from step $step of $last"
    take "$last" ${data:+"$data"}
  elif [ -n "${AT_LEAST:-}" ]; then
    refuse "AT_LEAST=$AT_LEAST, and no run $name is attached below $input; attach the last session's output"
  elif others=$(attached '*') && [ -n "$others" ] && [ "${NEW:-0}" != 1 ]; then
    refuse "no run $name is attached below $input, but these are:
$(sed 's/^/  /' <<<"$others")
To go on with one, give run_name= and the other words of its first session; for a new run, NEW=1"
  elif [ -n "$data" ]; then
    say "no earlier run $name below $input: a new one, with the data of $data"
    take "$data"
  else
    say "no earlier run $name below $input: a new one"
  fi
fi

if [ "${CHECK:-1}" != 0 ]; then
  say "checking"
  "$moeconv" train "${words[@]}" --check
fi

if [ "${TRIAL:-1}" != 0 ] && [ "$(last_step "$run")" = -1 ] && [ ! -e "$run/trial.json" ]; then
  say "trying which step is the faster one here"
  code=0
  "$moeconv" train "${words[@]}" --trial || code=$?
  [ "$code" != 130 ] || exit 130
  [ "$code" = 0 ] || say "WARNING: the trial failed (exit code $code); training as the recipe says"
fi

left=$((limit - SECONDS))
[ "$left" -gt 0 ] || { echo "SESSION=$session is over before training began" >&2; exit 2; }
say "training for at most $left s"
code=0
"$moeconv" train "${words[@]}" --time-limit "${left}s" || code=$?
if [ "$code" = 14 ]; then
  step=$(last_step "$run")
  say "not finished: attach this notebook's output to it as an input, and run it again" \
    "$([ "$step" = -1 ] || echo "with AT_LEAST=$step")"
  exit 0
fi
[ "$code" = 0 ] && say "finished: train/kaggle/export_to_hub.sh $run converts, verifies and pushes"
exit "$code"
