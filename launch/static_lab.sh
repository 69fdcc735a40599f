#!/usr/bin/env bash
# What static filters gain, alone and under OPUS: the kept corpora of configs/lab/static.yaml, then its runs.
#   launch/static_lab.sh       makes data/lab/static/ and runs/lab/static/; the same command goes on where it stopped
#   STOP_BEFORE_RUNS=1         leaves the runs out
# Every filter keeps the same share of the tokens of the laboratory's noisy corpus. What each has cost in processor
# seconds stands in data/lab/static/before.json, and the report adds it to the clock of the arms that use it.
set -euo pipefail

ROOT=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$ROOT"
python=${PYTHON:-$ROOT/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
out=data/lab/static
share=0.2
mkdir -p -- "$out/cost"

counted() { # counted NAME COMMAND...: once; its processor seconds go to cost/NAME
  [[ ! -e $out/cost/$1 ]] || return 0
  printf '\n==> %s: %s\n' "$1" "${*:2}"
  local before after
  before=$(awk '{print $16 + $17}' "/proc/$$/stat")
  "${@:2}"
  after=$(awk '{print $16 + $17}' "/proc/$$/stat")
  awk -v a="$after" -v b="$before" -v hz="$(getconf CLK_TCK)" 'BEGIN {print (a - b) / hz}' > "$out/cost/$1.part"
  mv -- "$out/cost/$1.part" "$out/cost/$1"
}

megatron() { "$python" -m megatron_opus "$@"; }

if [[ ! -e $out/target.jsonl ]]; then
  "$python" - "$out" <<'PYTHON'
import json, os, sys
from pathlib import Path

from megatron_opus.backends.formats import indexed
from megatron_opus.studies.lab.corpora import parts_of, prepare_lab

out = Path(sys.argv[1])
corpus = prepare_lab("noisy", "data", indexed, progress=False, log=print).resolve()
if not (out / "whole").exists():
    (out / "whole").symlink_to(os.path.relpath(corpus, out))
for role, name in (("validation", "held_out"), ("proxy", "target")):  # target.jsonl last: it says that all is there
    rows = [json.dumps({"text": text}) + "\n" for text in parts_of("noisy")["prose", role]]
    (out / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
PYTHON
fi

# the models: 150 steps on the whole corpus, and 40 more on the target's text, of other seeds than those of the arms
small=(configs/pretrain_gpt2_tiny.yaml output_dir="$out" selection.strategy=random data.domain_weights=null seed=1000
  model.num_layers=2 model.hidden_size=64 model.num_attention_heads=4 optimizer.lr=2e-3 optimizer.min_lr=2e-4
  training.eval_interval=0 training.checkpoint_interval=0 training.tensorboard=false training.log_interval=50)
tokenizer=$out/whole/tokenizer
counted prior "$python" -m megatron_opus.training "${small[@]}" name=prior data.path="$out/whole" training.train_steps=150
counted target_corpus megatron prepare-data --output "$out/target" --tokenizer "sentencepiece:$tokenizer/sentencepiece.model" \
  --candidates target="$out/target.jsonl" --validation prose="$out/held_out.jsonl"
counted conditional "$python" -m megatron_opus.training "${small[@]}" name=conditional data.path="$out/target" \
  training.train_steps=40 model.init_from="$out/prior"

corpus=(--corpus "$out/whole")
counted score_dsir megatron score-corpus "${corpus[@]}" --scorer dsir --target proxy --per ngram --output "$out/scores/dsir"
counted score_betr megatron score-corpus "${corpus[@]}" --scorer betr --target proxy --output "$out/scores/betr"
counted score_color megatron score-corpus "${corpus[@]}" --scorer color --prior "$out/prior" \
  --conditional "$out/conditional" --window 128 --windows 2 --output "$out/scores/color"
counted score_opus megatron score-corpus "${corpus[@]}" --scorer opus --model "$out/prior" --target proxy \
  --window 128 --windows 2 --output "$out/scores/opus"
for name in dsir betr color opus; do
  counted "keep_$name" megatron keep "${corpus[@]}" --scores "$out/scores/$name" --rule top --share "$share" \
    --output "$out/$name"
done

"$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
cost = {path.name: float(path.read_text()) for path in (out / "cost").iterdir()}
models = {"color": ("prior", "target_corpus", "conditional"), "opus": ("prior",)}
before = {
    f"{arm}{more}": round(sum(cost[n] for n in (f"score_{name}", f"keep_{name}", *models.get(name, ()))), 2)
    for name, arm in (("dsir", "dsir"), ("betr", "betr"), ("color", "color"), ("opus", "utility"))
    for more in ("", "_opus")
}
(out / "before.json").write_text(json.dumps(before, indent=1) + "\n", encoding="utf-8")
print(before)
PYTHON
[[ -z ${STOP_BEFORE_RUNS:-} ]] || exit 0
megatron experiment configs/lab/static.yaml --jobs "${JOBS:-1}"
