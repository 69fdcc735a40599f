#!/usr/bin/env bash
# Style, types and the whole test suite, from a clean clone:
#   tests/run.sh [pytest arguments]          everything
#   tests/run.sh --fast [pytest arguments]   style, and the tests that start no process and train nothing
set -euo pipefail

cd -- "$(dirname -- "$0")/.."
fast=false
if [[ ${1:-} == --fast ]]; then
  fast=true
  shift
fi
bash launch/install.sh test
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
if $fast; then
  mapfile -t paths <tests/fast.txt # what is not named here is not even imported
  exec python3 -m pytest -m fast "${paths[@]}" "$@"
fi
mypy
# two workers: whole files go to one, so that what a file computes once is computed once
exec python3 -m pytest -n 2 --dist loadfile "$@"
