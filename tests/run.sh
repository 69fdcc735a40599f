#!/usr/bin/env bash
# Style, types and the whole test suite, from a clean clone: tests/run.sh [pytest arguments]
set -euo pipefail

cd -- "$(dirname -- "$0")/.."
bash launch/install.sh test
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy
# two workers: whole files go to one, so that what a file computes once is computed once
exec python3 -m pytest -n 2 --dist loadfile "$@"
