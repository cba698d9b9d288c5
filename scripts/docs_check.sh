#!/usr/bin/env bash
# Regenerates the generated pages and fails if they changed (they are then right: commit them).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: docs_check.sh PYTHON}

before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
pages=(docs/mapping.md docs/cli.md docs/families.md README.md)
mkdir "$before/docs"
for page in "${pages[@]}"; do cp "$page" "$before/$page" 2>/dev/null || : >"$before/$page"; done
"$python" tools/docs.py
stale=0
for page in "${pages[@]}"; do diff -u "$before/$page" "$page" || stale=1; done
[ "$stale" = 0 ] || { echo "docs: these pages were out of date; now they are not: commit them" >&2; exit 1; }
