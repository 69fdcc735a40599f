#!/usr/bin/env python3
"""What scoring costs and how well it ranks, on this machine: tables, and JSON with --json.

    python tools/bench_scoring.py flops                                  # overhead of the recipes, counted from shapes
    python tools/bench_scoring.py overhead --hidden-size 512             # of a real step, on the clock and in FLOPs
    python tools/bench_scoring.py tax --hidden-size 1024 --estimators one_sided:64,two_sided:8192
    python tools/bench_scoring.py fidelity --hidden-size 512 --num-layers 4
    python tools/bench_scoring.py frontier --hidden-size 512 --json 512.json
    python tools/bench_scoring.py picture 512.json 1024.json --output frontier.png

`tax` and `overhead` need no training: the time of a pass does not depend on the weights. `fidelity` and `frontier`
train a GPT first, on the embedded corpus unless --corpus names a directory of tools/prepare_data.py. An estimator's
name may be followed by settings that save scored tokens, as in one_sided:64+score_length=128+score_windows=2.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron_opus.studies.bench import report

ROOT = Path(__file__).resolve().parent.parent
RECIPES = [ROOT / "configs" / f"{n}.yaml" for n in ("pretrain_gpt2_xl", "pretrain_gpt2_large", "cpt_qwen3_8b")]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.command == "picture":
            report.check_writable(args.output)
            report.draw_frontier([row for path in args.results for row in report.read(path)], args.output)
            return 0
        if args.json:
            report.check_writable(args.json)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron.core warns of GPU libraries that are not there
            from megatron_opus.studies.bench import commands

            torch.set_num_threads(args.threads)
            rows = commands.run(args, say=lambda text: print(text, file=sys.stderr, flush=True))
        if args.json:
            report.write(args.json, argv or sys.argv[1:], rows)
        print(report.table(rows))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bench_scoring: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=positive, default=torch.get_num_threads())
    common.add_argument("--json", type=Path, help="file for the numbers")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--hidden-size", type=positive, default=512)
    model.add_argument("--num-layers", type=positive, default=2)
    model.add_argument("--num-attention-heads", type=positive, help="default: hidden size / 64")
    model.add_argument("--proxy", type=positive, default=2, help="proxy sequences")
    model.add_argument("--dim", type=positive, default=8192, help="m of the sketch")
    model.add_argument("--intermediate-dim", type=positive, default=65536)
    model.add_argument("--scope", choices=["layer", "model"], help="default: model where the alignment is elsewhere")
    model.add_argument("--sketch-seed", type=int, default=42)
    model.add_argument("--score-micro-batch-size", type=positive)
    model.add_argument("--no-interaction", action="store_true", help="as with selection.redundancy.scale=off")
    model.add_argument("--corpus", type=Path, help="made by tools/prepare_data.py; default: the embedded corpus")
    model.add_argument("--cache-dir", type=Path, default=Path("data"), help="where the embedded corpus is prepared")
    model.add_argument("--mixture", help="domain=weight,... of training and of the mixed pool")
    model.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a busy machine, --threads 1")
    model.add_argument("--seed", type=int, default=42)
    trained = argparse.ArgumentParser(add_help=False)
    trained.add_argument("--homogeneous", help="domain of a second pool of nothing else; embedded corpus: source")
    trained.add_argument("--train-steps", type=positive, default=500)
    trained.add_argument("--batch-size", type=positive, default=2, help="sequences of a training step")

    def add(name: str, text: str, *parents: argparse.ArgumentParser) -> Callable[..., object]:
        sub = commands.add_parser(name, help=text, description=text, parents=[common, *parents])
        return sub.add_argument

    option = add("flops", "overhead of recipes in FLOPs, counted from shapes")
    option("--recipe", nargs="+", default=RECIPES, help="default: GPT-2 XL, GPT-2 Large, Qwen3-8B")
    option("overrides", nargs="*", metavar="key=value", help="of every recipe, such as optimizer.name=muon")

    option = add("tax", "scoring pass / its forward and backward", model)
    sizes(option, candidates=8, length=512, repeats=7, estimators="one_sided:64,two_sided:8192")

    option = add("fidelity", "the estimate against the float64 oracle", model, trained)
    sizes(option, candidates=32, length=512, repeats=None, estimators="one_sided:64,two_sided:8192")

    option = add("overhead", "a step with selection against one without", model)
    sizes(option, candidates=8, length=6144, repeats=5, estimators="one_sided:64")
    option("--chosen", type=positive, default=4, help="K, sequences of the update")
    option("--score-length", type=positive, default=512)
    option("--micro-batch-size", type=positive, default=1, help="of the update")

    option = add("frontier", "tax and fidelity of every estimator and size", model, trained)
    sizes(option, candidates=32, length=512, repeats=2, estimators="all")
    option("--tax-candidates", type=positive, default=8, help="with --proxy, the sequences of the timed pass")
    option("--fidelity-proxy", type=positive, default=8)

    sub = commands.add_parser("picture", help="tax against fidelity, from the JSON files of `frontier`")
    sub.add_argument("results", nargs="+", type=Path, metavar="FRONTIER.json")
    sub.add_argument("--output", type=Path, default=Path("frontier.png"), help=".svg or .png; default frontier.png")
    args = parser.parse_args(argv)
    if args.command == "flops":  # `--recipe FILE key=value`: the option takes all that follow
        given = [str(x) for x in args.recipe]
        args.overrides += [x for x in given if "=" in x]
        args.recipe = [Path(x) for x in given if "=" not in x] or RECIPES
    if getattr(args, "clock", "wall") == "cpu" and (args.threads > 1 or torch.cuda.is_available()):
        parser.error("--clock cpu: expected --threads 1 and no accelerator; it counts the work of one thread")
    return args


def sizes(option: Callable[..., object], *, candidates: int, length: int, repeats: int | None, estimators: str) -> None:
    option("--candidates", type=positive, default=candidates)
    option("--length", type=positive, default=length, help="tokens of each sequence")
    if repeats is not None:
        option("--repeats", type=positive, default=repeats)
    option("--estimators", default=estimators, help="kind:size[+key=value...],...; all: the frontier's list")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    sys.exit(main())
