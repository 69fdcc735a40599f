"""What scoring costs and how well it ranks, on this machine: tables, and JSON with --json.

    megatron-opus bench-scoring flops                                  # overhead of the recipes, counted from shapes
    megatron-opus bench-scoring overhead --hidden-size 512             # of a real step, on the clock and in FLOPs
    megatron-opus bench-scoring tax --hidden-size 1024 --estimators one_sided:64,two_sided:8192
    megatron-opus bench-scoring fidelity --hidden-size 512 --num-layers 4
    megatron-opus bench-scoring frontier --hidden-size 512 --json 512.json
    megatron-opus bench-scoring proxy --hidden-size 128 --num-layers 3  # batches of the proxy against many sequences
    megatron-opus bench-scoring picture 512.json 1024.json --output frontier.png

`tax` and `overhead` need no training: the time of a pass does not depend on the weights. `fidelity`, `frontier`
and `proxy` train a GPT first, on the embedded corpus unless --corpus names a directory of `megatron-opus prepare-data`.
An estimator's name may be followed by settings that save scored tokens, as in
one_sided:64+score_length=128+score_windows=2.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_opus.cli import parser_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [ROOT / "configs" / f"{n}.yaml" for n in ("pretrain_gpt2_xl", "pretrain_gpt2_large", "cpt_qwen3_8b")]


def main(argv: Sequence[str], program: str) -> int:
    args = parse(argv, program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns of GPU libraries that are not there
        import torch

        from megatron_opus.studies.bench import report

        if args.command == "picture":
            report.check_writable(args.output)
            report.draw_frontier([row for path in args.results for row in report.read(path)], args.output)
            return 0
        if getattr(args, "clock", "wall") == "cpu" and torch.cuda.is_available():
            raise report.BenchFileError("--clock cpu: expected no accelerator; it counts the work of one thread")
        if args.json:
            report.check_writable(args.json)
        from megatron_opus.studies.bench import commands

        if args.threads:
            torch.set_num_threads(args.threads)
        rows = commands.run(args, say=lambda text: print(text, file=sys.stderr, flush=True))
    if args.json:
        report.write(args.json, [*program.split(), *argv], rows)
    print(report.table(rows))
    return 0


def parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = parser_of("bench-scoring", program, __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=positive, help="default: as many as torch takes")
    common.add_argument("--json", type=Path, help="file for the numbers")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--hidden-size", type=positive, default=512)
    model.add_argument("--num-layers", type=positive, default=2)
    model.add_argument("--num-attention-heads", type=positive, help="default: hidden size / 64")
    model.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    model.add_argument("--dim", type=positive, default=8192, help="m of the sketch")
    model.add_argument("--intermediate-dim", type=positive, default=65536)
    model.add_argument("--scope", choices=["layer", "model"], help="default: model where the alignment is elsewhere")
    model.add_argument("--sketch-seed", type=int, default=42)
    model.add_argument("--score-micro-batch-size", type=positive)
    model.add_argument("--no-interaction", action="store_true", help="as with selection.redundancy.scale=off")
    model.add_argument("--corpus", type=Path, help="made by megatron-opus prepare-data; default: the embedded corpus")
    model.add_argument("--cache-dir", type=Path, default=Path("data"), help="where the embedded corpus is prepared")
    model.add_argument("--mixture", help="domain=weight,... of training and of the mixed pool")
    model.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a busy machine, --threads 1")
    model.add_argument("--seed", type=int, default=42)
    trained = argparse.ArgumentParser(add_help=False)
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

    pools = argparse.ArgumentParser(add_help=False)
    pools.add_argument("--homogeneous", help="domain of a second pool of nothing else; embedded corpus: source")
    option = add("fidelity", "the estimate against the float64 oracle", model, trained, pools)
    sizes(option, candidates=32, length=512, repeats=None, estimators="one_sided:64,two_sided:8192")

    option = add("overhead", "a step with selection against one without", model)
    sizes(option, candidates=8, length=6144, repeats=5, estimators="one_sided:64")
    option("--chosen", type=positive, default=4, help="K, sequences of the update")
    option("--score-length", type=positive, default=512)
    option("--micro-batch-size", type=positive, default=1, help="of the update")

    option = add("frontier", "tax and fidelity of every estimator and size", model, trained, pools)
    sizes(option, candidates=32, length=512, repeats=2, estimators="all")
    option("--tax-candidates", type=positive, default=8, help="with --proxy, the sequences of the timed pass")
    option("--fidelity-proxy", type=positive, default=8)

    option = add("proxy", "sizes, momentum and refreshing of the proxy, against many sequences", model, trained)
    sizes(option, candidates=64, length=128, repeats=7, estimators=None, proxy=256)
    option("--domain-candidates", type=positive, default=48, help="of each domain's own pool")
    option("--tax-candidates", type=positive, default=32, help="the candidates of the timed passes")
    option("--score-length", type=positive, default=16)
    option("--further-steps", type=positive, default=26, help="steps with scores, after those of the training")
    option("--warm-up-steps", type=positive, default=10, help="of these, the first that are not counted")

    sub = commands.add_parser("picture", help="tax against fidelity, from the JSON files of `frontier`")
    sub.add_argument("results", nargs="+", type=Path, metavar="FRONTIER.json")
    sub.add_argument("--output", type=Path, default=Path("frontier.png"), help=".svg or .png; default frontier.png")
    args = parser.parse_args(argv)
    if args.command == "flops":  # `--recipe FILE key=value`: the option takes all that follow
        given = [str(x) for x in args.recipe]
        args.overrides += [x for x in given if "=" in x]
        args.recipe = [Path(x) for x in given if "=" not in x] or RECIPES
    if getattr(args, "clock", "wall") == "cpu" and args.threads != 1:
        parser.error("--clock cpu: expected --threads 1; it counts the work of one thread")
    return args


def sizes(
    option: Callable[..., object],
    *,
    candidates: int,
    length: int,
    repeats: int | None,
    estimators: str | None,
    proxy: int = 2,
) -> None:
    option("--candidates", type=positive, default=candidates)
    option("--proxy", type=positive, default=proxy, help="proxy sequences; of the truth, if the proxy is measured")
    option("--length", type=positive, default=length, help="tokens of each sequence")
    if repeats is not None:
        option("--repeats", type=positive, default=repeats)
    if estimators is not None:
        option("--estimators", default=estimators, help="kind:size[+key=value...],...; all: the frontier's list")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value
