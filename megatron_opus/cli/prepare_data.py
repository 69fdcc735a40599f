"""Text to Megatron token files, one stream per domain and role, in one directory that trains as data=DIR.

    megatron-opus prepare-data --output data/mix --tokenizer gpt2:gpt2_files \\
        --candidates wiki=wiki.jsonl --candidates code='code/*.parquet' \\
        --target science=science.jsonl --holdout 0.2 --workers 8

    megatron-opus prepare-data --output data/fineweb --tokenizer gpt2:gpt2_files \\
        --preset fineweb-edu --max-tokens 10B --target science=science.jsonl \\
        --decontaminate benchmarks/mmlu.jsonl --metadata-template science='{title}\\n\\n' --workers 16

Candidates are what the run chooses from, proxies define what is useful, validation measures it. Text that is held out
never enters a lower role (validation > proxy > candidates). Run the same command again to resume an interrupted one.
docs/data.md has the formats and the rules.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.cli import parser_of
from megatron_opus.data.manifest import CONTAMINATED_FILE, Manifest
from megatron_opus.data.prepare.decontaminate import Decontamination
from megatron_opus.data.prepare.pipeline import prepare
from megatron_opus.data.prepare.presets import PRESETS, Request, datasets_of, general_read
from megatron_opus.data.prepare.resolve import PrepareConfig, expand_files

# option -> (metavar, help) of what may be given once for all datasets and once for each
PER_DATASET = {
    "text-key": ("[NAME=]KEY", "key or column that holds the text (default text)"),
    "mask-key": ("[NAME=]KEY", "key of [[start, end], ...], characters of the text that are not to be learned"),
    "metadata-template": ("[NAME=]TEXT", "header with keys in braces in front of every document, not to be learned"),
    "score-key": ("[NAME=]KEY", "key of a number that is kept for every document"),
    "bucket-key": ("[NAME=]KEY", "key of the number that --bucket looks at (default: the score)"),
}


def parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = parser_of("prepare-data", program, __doc__)
    sources = (
        "NAME=FILE, a directory, a glob, datasets:NAME[@CONFIG][:SPLIT] or, streamed, "
        "hub:NAME[@CONFIG][:SPLIT][#REVISION]; several may be given, also per name"
    )

    def several(option: str, metavar: str, text: str) -> None:
        parser.add_argument(f"--{option}", action="append", default=[], metavar=metavar, help=text)

    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="SPEC",
        help="gpt2:DIR, sentencepiece:FILE, hf:tokenizer.json, or train-sentencepiece (on the candidates)",
    )
    parser.add_argument("--vocab-size", type=int, default=8192, help="of train-sentencepiece (default 8192)")
    parser.add_argument("--eod", help="token that ends a document, where the tokenizer does not tell")
    several("candidates", "NAME=FILES", sources)
    several("preset", "PRESET[=FILES]", f"candidates by name: {', '.join(PRESETS)}; with files, of local ones")
    several("target", "NAME=FILES", "split by a hash of the text into validation (--holdout) and proxy (the rest)")
    parser.add_argument("--holdout", type=float, default=0.2, help="share of a target for validation (default 0.2)")
    several("proxy", "NAME=FILES", "documents for proxy only")
    several("validation", "NAME=FILES", "for validation only")
    parser.add_argument(
        "--candidates-holdout", type=float, default=0.0, help="share of every candidate domain for validation"
    )
    for option, (metavar, text) in PER_DATASET.items():
        several(option, metavar, text)
    several("bucket", "NAME=LOW:HIGH", "only documents of this dataset whose number lies in the closed range")
    several("max-documents", "[NAME=]N", "where a dataset ends; without a name: every candidate dataset (10M is 10^7)")
    several("max-tokens", "[NAME=]N", "likewise, in tokens")
    parser.add_argument(
        "--txt-documents",
        choices=("file", "paragraph", "line"),
        default="file",
        help="what a document is in a .txt file: all of it (default), a block between blank lines, a line",
    )
    several("decontaminate", "FILES", "benchmarks; candidates and proxies that share --decontaminate-ngram words go")
    parser.add_argument("--decontaminate-ngram", type=int, default=13, metavar="N", help="words (default 13)")
    parser.add_argument(
        "--decontaminate-min-words", type=int, default=8, metavar="N", help="of the shortest item (default 8)"
    )
    parser.add_argument("--decontaminate-fields", default="", metavar="A,B", help="of the benchmarks; default: all")
    parser.add_argument("--keep-duplicates", action="store_true", help="of documents with the same text in one role")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at a malformed record")
    parser.add_argument("--workers", type=int, default=2, help="processes; the output does not depend on it")
    return parser.parse_args(argv)


def request_of(arguments: argparse.Namespace) -> Request:
    read = {option.replace("-", "_"): getattr(arguments, option.replace("-", "_")) for option in PER_DATASET}
    # A shell passes a backslash and an n where a line end is meant.
    read["metadata_template"] = [text.replace("\\n", "\n") for text in read["metadata_template"]]
    return Request(
        sources={role: getattr(arguments, role) for role in ("candidates", "proxy", "validation", "target")},
        presets=arguments.preset,
        holdout=arguments.holdout,
        candidates_holdout=arguments.candidates_holdout,
        txt_documents=arguments.txt_documents,
        read=read,
        buckets=arguments.bucket,
        max_documents=arguments.max_documents,
        max_tokens=arguments.max_tokens,
    )


def table(manifest: Manifest) -> str:
    columns = ("documents", "tokens", "masked_tokens", "held_out", "duplicates", "contaminated", "empty", "skipped")
    lines = [f"{'role':<12}{'domain':<20}" + "".join(f"{c.replace('_', ' '):>15}" for c in columns)]
    for entry in manifest.datasets:
        lines.append(f"{entry.role:<12}{entry.name:<20}" + "".join(f"{getattr(entry, c):>15,}" for c in columns))
    return "\n".join(lines)


def main(argv: Sequence[str], program: str) -> int:
    arguments = parse(argv, program)
    request = request_of(arguments)
    datasets = datasets_of(request)
    decontamination = Decontamination(
        files=expand_files("--decontaminate", arguments.decontaminate),
        n=arguments.decontaminate_ngram,
        min_words=arguments.decontaminate_min_words,
        fields=tuple(name for name in arguments.decontaminate_fields.split(",") if name),
    )
    with warnings.catch_warnings():
        # Here rather than above: importing megatron.core takes seconds, and a mistyped option should not. It
        # warns of missing GPU libraries, which token files do not need.
        warnings.simplefilter("ignore")
        from megatron_opus.backends.formats import indexed

    manifest = prepare(
        PrepareConfig(
            output=arguments.output,
            tokenizer=arguments.tokenizer,
            datasets=datasets,
            vocab_size=arguments.vocab_size,
            eod=arguments.eod,
            read=general_read(request, datasets),
            on_error=arguments.on_error,
            duplicates="keep" if arguments.keep_duplicates else "drop",
            decontamination=decontamination,
            workers=arguments.workers,
        ),
        indexed,
    )
    print(table(manifest))
    for name in (f"{e.role}/{e.name}: {e.contaminated}" for e in manifest.datasets if e.contaminated):
        print(f"{name} documents dropped for a benchmark overlap, see {arguments.output / CONTAMINATED_FILE}")
    print(f"\n{arguments.output}: train on it with data={arguments.output}")
    return 0
