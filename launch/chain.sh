#!/usr/bin/env bash
# The whole chain on real text, on a CPU: raw files -> prepared corpus -> proxy -> OPUS and random -> export and
# benchmarks -> report. What docs/chain.md records.
#   launch/chain.sh TEXT [OUT]     TEXT holds pile_domains/*.jsonl and benchmarks_olmo/*.jsonl; OUT is runs/chain
#   STEPS, LIMIT, ENCODER          300 steps; 200 questions of each benchmark; lexical, or a sentence-transformers name
# Needs the extras lab, eval and proxy. Runs again from where it was interrupted: every part keeps what is finished.
set -euo pipefail

ROOT=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
text=${1:?expected the folder of raw text: launch/chain.sh TEXT [OUT]}
out=${2:-runs/chain}
python=${PYTHON:-$ROOT/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
domains=(wikipedia_en pile_cc stackexchange pubmed_abstracts hackernews uspto_backgrounds)
benchmarks=(arc_easy arc_challenge commonsense_qa)
declare -A target=([arc_easy]=arc_easy_train [arc_challenge]=arc_challenge_train [commonsense_qa]=csqa_train)
declare -A held_out=([arc_easy]=arc_easy_test [arc_challenge]=arc_challenge_test [commonsense_qa]=csqa_val)

candidates=() toward=() test_files=() decontaminate=()
for name in "${domains[@]}"; do candidates+=(--candidates "$name=$text/pile_domains/$name.jsonl"); done
for name in "${benchmarks[@]}"; do
  toward+=("$name=$text/benchmarks_olmo/${target[$name]}.jsonl")
  test_files+=("$name=$text/benchmarks_olmo/${held_out[$name]}.jsonl")
  decontaminate+=(--decontaminate "$text/benchmarks_olmo/${held_out[$name]}.jsonl")
done

timed() { # timed WHAT COMMAND...
  local started=$SECONDS
  printf '\n==> %s\n' "$1"
  printf '%q ' "${@:2}"
  printf '\n'
  "${@:2}"
  printf '==> %s: %d s\n' "$1" "$((SECONDS - started))"
}

mkdir -p -- "$out"
timed "corpus" "$python" "$ROOT/tools/prepare_data.py" --output "$out/corpus" --tokenizer train-sentencepiece \
  "${candidates[@]}" --candidates-holdout 0.03 "${decontaminate[@]}"
timed "proxy" "$python" "$ROOT/tools/build_proxy.py" --corpus "$out/corpus" --output "$out/proxied" \
  --benchmarks "${toward[@]}" --encoder "${ENCODER:-lexical}" --token-budget "${PROXY_TOKENS:-200k}"
for strategy in opus random; do
  resume=()
  [[ ! -e $out/$strategy/config.yaml ]] || resume=(--resume)
  if [[ ! -e $out/$strategy/finished ]]; then
    timed "training, $strategy" env DEEPSPEED_ARGS="--num_gpus 1" bash "$ROOT/launch/pretrain_gpt2_tiny.sh" \
      name="$strategy" output_dir="$out" data.path="$out/proxied" data.domain_weights=null \
      training.train_steps="${STEPS:-300}" selection.strategy="$strategy" ${resume[@]+"${resume[@]}"}
    touch -- "$out/$strategy/finished"
  fi
  timed "evaluation, $strategy" "$python" "$ROOT/tools/evaluate.py" "$out/$strategy" --benchmarks "${test_files[@]}" \
    --limit "${LIMIT:-200}" --device cpu
done
timed "report" "$python" "$ROOT/tools/report.py" "$out/random" "$out/opus" --output "$out/report.html"
echo "$out/report.html"
