#!/usr/bin/env bash
# Style, types and the whole test suite, from a clean clone:
#   tests/run.sh [pytest arguments]          everything
#   tests/run.sh --fast [pytest arguments]   style, and the tests that start no process and train nothing
#   tests/run.sh --whole [pytest arguments]  the same with every case of every test, not the short form alone
#   tests/run.sh --chaos [pytest arguments]  tests/chaos in its whole form: every fault, both engines
#   tests/run.sh --latest [pytest arguments] what touches Megatron (tests/latest.txt), on the newest releases
set -euo pipefail

cd -- "$(dirname -- "$0")/.."
fast=false
if [[ ${1:-} == --fast ]]; then
  fast=true
  shift
fi
if [[ ${1:-} == --latest ]]; then
  shift
  for python in python3 python3.{12..19} "$HOME"/.pyenv/versions/3.*/bin/python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      echo "latest: about 4 minutes and 5 GB to install, once"
      PYTHON=$python bash launch/install.sh latest
      mapfile -t paths <tests/latest.txt
      exec .venv-latest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${paths[@]}" "$@"
    fi
  done
  echo "latest: skipped, for there is no Python 3.12 or newer on PATH or among pyenv's versions"
  exit 0
fi
bash launch/install.sh test
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
if $fast; then
  mapfile -t paths <tests/fast.txt # what is not named here is not even imported
  exec python3 -m pytest -m fast "${paths[@]}" "$@"
fi
if [[ ${1:-} == --chaos ]]; then
  exec python3 -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/chaos --whole "$@"
fi
mypy
# two workers: whole files go to one, so that what a file computes once is computed once; in their order, for xdist's own
# takes files of few tests last, and those of minutes (Slurm) would find the other worker idle
exec python3 -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
