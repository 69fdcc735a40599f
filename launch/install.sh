#!/usr/bin/env bash
# Makes .venv in the repository and installs the pinned dependencies: install.sh [EXTRA], for example `install.sh test`.
# Nothing is done, and pip is not started, while constraints.txt and pyproject.toml are what was installed last.
# `install.sh latest` makes .venv-latest with the newest releases that pyproject.toml allows, instead of the pinned ones.
#   PYTHON            interpreter to build the environment from (python3)
#   TORCH_INDEX_URL   package index to take torch from, for example PyTorch's own index of CPU-only builds
set -euo pipefail

extra=${1:-}
cd -- "$(dirname -- "$0")/.."
python=${PYTHON:-python3}
venv=.venv
pins=(-c constraints.txt)
torch=$(grep -E '^torch==' constraints.txt)
if [[ $extra == latest ]]; then
  venv=.venv-latest pins=() torch=torch
fi

fail() {
  echo "error: $*" >&2
  exit 1
}

checksum() {
  "$venv/bin/python" -c 'import hashlib, pathlib, sys
print(hashlib.sha256(b"".join(pathlib.Path(p).read_bytes() for p in sys.argv[1:])).hexdigest())' \
    constraints.txt pyproject.toml
}

supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; }

stamp=$venv/.installed${extra:+-$extra}
if [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$(checksum)" ]]; then
  exit 0
fi

if [[ ! -x $venv/bin/python ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  command -v "$python" >/dev/null || fail "$python: not found. Install Python 3.10 or later, or set PYTHON to one."
  supported "$python" || fail "expected Python 3.10 or later, got $("$python" --version). Set PYTHON to a later one."
  echo "Making $PWD/$venv with $("$python" --version)"
  "$python" -m venv --clear "$venv" || fail "$python -m venv failed. Where the message above speaks of ensurepip," \
    "install the system's package of it (Debian and Ubuntu: apt install python3-venv) and run this again."
fi
supported "$venv/bin/python" || fail "$PWD/$venv has $("$venv/bin/python" --version), expected 3.10 or later." \
  "Move it away and run this again."

echo "Installing into $PWD/$venv (once; torch is the large part)"
started=$SECONDS
# torch comes first and alone: TORCH_INDEX_URL must hold for it only, and whatever is built from source afterwards
# finds the pinned build instead of fetching another.
"$venv/bin/python" -m pip install --disable-pip-version-check ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
  "$torch" || fail "torch could not be installed; pip says why above."
"$venv/bin/python" -m pip install --disable-pip-version-check "${pins[@]}" -e ".${extra:+[$extra]}" ||
  fail "the dependencies could not be installed; pip says why above. What is installed is kept: run this again."
checksum >"$stamp"
[[ -z $extra ]] || checksum >"$venv/.installed"
echo "Installed in $((SECONDS - started)) s"
