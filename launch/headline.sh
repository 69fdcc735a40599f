#!/usr/bin/env bash
# The headline experiments: what DSIR keeps of two corpora beforehand, then the runs of configs/lab/headline*.yaml,
# configs/lab/explored*.yaml and configs/lab/gated*.yaml.
#   JOBS=2 launch/headline.sh    makes data/lab/headline/ and the runs, two at a time; the same command
#                                goes on where it stopped
# What DSIR has cost in processor seconds stands in data/lab/headline/KIND/before.json, and the report adds it to the
# clock of its arm.
set -euo pipefail

ROOT=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$ROOT"
python=${PYTHON:-$ROOT/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

"$python" - <<'PYTHON'
import json, os, resource, shutil, subprocess, sys
from pathlib import Path

from megatron_opus.backends.formats import indexed
from megatron_opus.studies.lab.corpora import prepare_lab


def megatron(*arguments):
    subprocess.run([sys.executable, "-m", "megatron_opus", *map(str, arguments)], check=True)


def seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


for kind in ("noisy", "hidden"):
    out = Path("data/lab/headline", kind)
    if (out / "before.json").exists():
        continue
    out.mkdir(parents=True, exist_ok=True)
    corpus = prepare_lab(kind, "data", indexed, progress=False, log=print).resolve()
    if not (out / "whole").exists():
        (out / "whole").symlink_to(os.path.relpath(corpus, out))
    for name in ("scores", "dsir"):  # of a call that was interrupted: its seconds are not known
        shutil.rmtree(out / name, ignore_errors=True)
    begin = seconds()
    of = ("--corpus", out / "whole")
    megatron("score-corpus", *of, "--scorer", "dsir", "--target", "proxy", "--per", "ngram", "--output", out / "scores")
    megatron("keep", *of, "--scores", out / "scores", "--rule", "top", "--share", "0.2", "--output", out / "dsir")
    (out / "before.json").write_text(json.dumps({"dsir": round(seconds() - begin, 2)}) + "\n")
PYTHON
for name in headline headline_hidden headline_clean explored explored_hidden explored_clean gated gated_hidden gated_clean; do
  "$python" -m megatron_opus experiment "configs/lab/$name.yaml" --jobs "${JOBS:-1}"
done
