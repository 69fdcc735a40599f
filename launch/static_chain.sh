#!/usr/bin/env bash
# Static selection under OPUS on real text, on a CPU: raw files -> corpus -> proxy -> three scorings -> their page ->
# keep -> training with OPUS -> report. What docs/static_selection.md records.
#   launch/static_chain.sh TEXT [OUT]  TEXT holds pile_domains/*.jsonl and benchmarks_olmo/*.jsonl; OUT is runs/static_chain
#   STEPS                              of either run: 100
# Needs the extras lab and proxy. Runs again from where it was interrupted: every part keeps what is finished.
set -euo pipefail

ROOT=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
text=${1:?expected the folder of raw text: launch/static_chain.sh TEXT [OUT]}
out=${2:-runs/static_chain}
python=${PYTHON:-$ROOT/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

candidates=()
for name in wikipedia_en pile_cc stackexchange pubmed_abstracts hackernews uspto_backgrounds; do
  candidates+=(--candidates "$name=$text/pile_domains/$name.jsonl")
done
toward=(arc_easy="$text/benchmarks_olmo/arc_easy_train.jsonl" commonsense_qa="$text/benchmarks_olmo/csqa_train.jsonl")

megatron() {
  local started=$SECONDS
  printf '\n==> megatron-opus'
  printf ' %q' "$@"
  printf '\n'
  "$python" -m megatron_opus "$@"
  printf '==> %d s\n' "$((SECONDS - started))"
}

train() { # train NAME key=value...
  [[ ! -e $out/$1/finished ]] || return 0
  local resume=()
  [[ ! -e $out/$1/config.yaml ]] || resume=(--resume)
  megatron train "$ROOT/configs/pretrain_gpt2_tiny.yaml" name="$1" output_dir="$out" data.domain_weights=null \
    training.train_steps="${STEPS:-100}" training.eval_interval=50 "${@:2}" ${resume[@]+"${resume[@]}"}
  touch -- "$out/$1/finished"
}

mkdir -p -- "$out"
megatron prepare-data --output "$out/corpus" --tokenizer train-sentencepiece "${candidates[@]}" --candidates-holdout 0.03
megatron build-proxy --corpus "$out/corpus" --output "$out/proxied" --benchmarks "${toward[@]}" --encoder lexical \
  --token-budget 100k --scores "$out/similarities"
train reference data.path="$out/proxied" selection.strategy=random

corpus=(--corpus "$out/proxied")
megatron score-corpus "${corpus[@]}" --scorer dsir --target proxy --per ngram --output "$out/scores/dsir"
megatron score-corpus "${corpus[@]}" --scorer betr --benchmarks "${toward[@]}" --output "$out/scores/betr"
megatron score-corpus "${corpus[@]}" --scorer loss --model "$out/reference" --window 128 --windows 2 --output "$out/scores/loss"
scores=(--scores d="$out/scores/dsir" b="$out/scores/betr" l="$out/scores/loss")
rule="gumbel:0.5@d and band:0.02-0.9@l"
megatron score-report "${corpus[@]}" "${scores[@]}" --rules top@d top@b "$rule" --share 0.3 --output "$out/scores.html"
megatron keep "${corpus[@]}" "${scores[@]}" --rule "$rule" --share 0.3 --duplicates exact --output "$out/kept"
train kept_opus data.path="$out/kept" selection.strategy=opus
megatron report "$out/reference" "$out/kept_opus" --output "$out/report.html"
