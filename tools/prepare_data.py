#!/usr/bin/env python3
"""Text files to Megatron token files, one stream per domain and role, in one directory that trains as data=DIR.

    python tools/prepare_data.py --output data/mix --tokenizer gpt2:gpt2_files \\
        --candidates wiki=wiki.jsonl --candidates code='code/*.parquet' \\
        --target science=science.jsonl --holdout 0.2 --workers 8

Candidates are what the run chooses from, proxies define what is useful, validation measures it. Text that is held out
never enters a lower role (validation > proxy > candidates). Run the same command again to resume an interrupted one.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_opus.data.manifest import Manifest, Role
from megatron_opus.data.plan import DatasetSpec, PrepareConfig, holdout
from megatron_opus.data.prepare import prepare
from megatron_opus.data.records import ReadOptions


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = "NAME=FILE, a directory, a glob or datasets:NAME[@CONFIG][:SPLIT]; several may be given, also per name"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="SPEC",
        help="gpt2:DIR, sentencepiece:FILE, hf:tokenizer.json, or train-sentencepiece (on the candidates)",
    )
    parser.add_argument("--vocab-size", type=int, default=8192, help="of train-sentencepiece (default 8192)")
    parser.add_argument("--eod", help="token that ends a document, where the tokenizer does not tell")
    parser.add_argument("--candidates", action="append", default=[], metavar="NAME=FILES", help=sources)
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="NAME=FILES",
        help="documents split by a hash of their text into validation (--holdout) and proxy (the rest)",
    )
    parser.add_argument("--holdout", type=float, default=0.2, help="share of a target for validation (default 0.2)")
    parser.add_argument("--proxy", action="append", default=[], metavar="NAME=FILES", help="documents for proxy only")
    parser.add_argument("--validation", action="append", default=[], metavar="NAME=FILES", help="for validation only")
    parser.add_argument("--text-key", default="text", help="key or column that holds the text (default text)")
    parser.add_argument(
        "--txt-documents",
        choices=("file", "paragraph", "line"),
        default="file",
        help="what a document is in a .txt file: all of it (default), a block between blank lines, a line",
    )
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at a malformed record")
    parser.add_argument("--workers", type=int, default=2, help="processes; the output does not depend on it")
    return parser.parse_args(argv)


def specs(arguments: argparse.Namespace) -> tuple[DatasetSpec, ...]:
    """The datasets of the command line; files of the same role and name are put together."""

    def grouped(option: str) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for value in getattr(arguments, option):
            name, sep, files = value.partition("=")
            if not sep or not name or not files:
                raise ValueError(f"--{option} {value!r}: expected NAME=FILES, for example --{option} wiki=wiki.jsonl")
            found[name] = (*found.get(name, ()), files)
        return found

    roles: tuple[Role, ...] = ("candidates", "proxy", "validation")
    result = [DatasetSpec(name=n, role=role, sources=s) for role in roles for n, s in grouped(role).items()]
    for name, files in grouped("target").items():
        result += holdout(name, files, arguments.holdout)
    return tuple(result)


def table(manifest: Manifest) -> str:
    lines = [f"{'role':<12}{'domain':<20}{'documents':>12}{'tokens':>16}{'held out':>10}{'empty':>8}{'skipped':>9}"]
    for e in manifest.datasets:
        lines.append(
            f"{e.role:<12}{e.name:<20}{e.documents:>12,}{e.tokens:>16,}{e.held_out:>10,}{e.empty:>8,}{e.skipped:>9,}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        datasets = specs(arguments)
        with warnings.catch_warnings():
            # Here rather than above: importing megatron.core takes seconds, and a mistyped option should not. It
            # warns of missing GPU libraries, which token files do not need.
            warnings.simplefilter("ignore")
            from megatron_opus.backends import indexed

        manifest = prepare(
            PrepareConfig(
                output=arguments.output,
                tokenizer=arguments.tokenizer,
                datasets=datasets,
                vocab_size=arguments.vocab_size,
                eod=arguments.eod,
                read=ReadOptions(text_key=arguments.text_key, txt_documents=arguments.txt_documents),
                on_error=arguments.on_error,
                workers=arguments.workers,
            ),
            indexed,
        )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data: interrupted; the same command resumes", file=sys.stderr)
        return 130
    print(table(manifest))
    print(f"\n{arguments.output}: train on it with data={arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
