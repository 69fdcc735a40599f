#!/usr/bin/env python3
"""What scoring costs and how well it ranks, on this machine: a table, and JSON with --json.

    python tools/bench_scoring.py tax --hidden-size 1024 --num-layers 2 --length 512 --candidates 8 --proxy 2
    python tools/bench_scoring.py fidelity --hidden-size 512 --num-layers 4 --train-steps 500

`tax` needs no training: the time of a pass does not depend on the weights. `fidelity` trains a GPT first on the corpus
(the embedded one unless --corpus names a directory of tools/prepare_data.py) and compares with the float64 oracle.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megatron_opus.backends import indexed
from megatron_opus.backends.deepspeed import init_distributed
from megatron_opus.backends.megatron import init_parallel
from megatron_opus.config import ModelConfig, ParallelConfig, PreconditionerConfig, SelectionConfig, SketchConfig
from megatron_opus.data.embedded import prepare_embedded
from megatron_opus.training import bench

# name -> (operator, alignment, form); a colon adds a size: two_sided:8192, one_sided:64
ESTIMATORS = {
    "materialise": ("materialise", "features", "separable"),
    "materialise-exact": ("materialise", "features", "exact"),
    "two_sided": ("two_sided", "features", "separable"),
    "two_stage": ("two_stage", "features", "separable"),
    "tensor_sketch": ("tensor_sketch", "features", "separable"),
    "one_sided": ("two_sided", "one_sided", "separable"),
    "direction": ("two_sided", "direction", "separable"),
    "direction-exact": ("materialise", "direction", "exact"),
}


def estimator(name: str, args: argparse.Namespace) -> SelectionConfig:
    kind, _, size = name.partition(":")
    operator, alignment, form = ESTIMATORS[kind]
    sketch = SketchConfig(
        operator=operator,
        alignment=alignment,
        dim=int(size) if size and alignment == "features" else args.dim,
        one_sided_dim=int(size) if size and alignment == "one_sided" else 128,
        intermediate_dim=args.intermediate_dim,
        scope=args.scope,
        seed=args.sketch_seed,
    )
    return SelectionConfig(
        sketch=sketch,
        preconditioner=PreconditionerConfig(form=form),
        score_length=args.length,
        score_micro_batch_size=args.score_micro_batch_size,
    )


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = init_distributed(ParallelConfig())
    init_parallel(ParallelConfig(), seed=args.seed)
    corpus = Path(args.corpus) if args.corpus else prepare_embedded(args.cache_dir, indexed)
    model = ModelConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads or max(1, args.hidden_size // 64),
    )
    work = bench.Workbench(model, corpus, length=args.length, device=device, seed=args.seed)
    mixture = dict(pair.split("=") for pair in args.mixture.split(",")) if args.mixture else None
    weights = {name: float(value) for name, value in mixture.items()} if mixture else None
    # at least one step: before it the geometry is SGD's and there is nothing to precondition with
    steps = args.train_steps if args.command == "fidelity" else 1
    work.train(steps, args.batch_size, mixture=weights, cache=Path(args.model_cache) if args.model_cache else None)
    rows = tax(work, args, weights) if args.command == "tax" else fidelity(work, args, weights)
    result = {
        "command": sys.argv[1:],
        "machine": {"device": str(device), "processor": platform.processor(), "torch": torch.__version__},
        "train_loss": [sum(x) / len(x) for x in (work.losses[:10], work.losses[-10:])],
        "rows": rows,
    }
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def tax(work: bench.Workbench, args: argparse.Namespace, weights: dict[str, float] | None) -> list[dict[str, Any]]:
    pool = work.pool("mixed", args.candidates, args.proxy, weights)
    together = bench.Batch.cat([pool.candidates, pool.proxy])
    micro = args.score_micro_batch_size or len(together)

    def plain() -> None:
        for first in range(0, len(together), micro):
            work.plain(together.rows(first, min(first + micro, len(together))))

    scorers = {name: work.scorer(estimator(name, args)) for name in args.estimators}
    runs: dict[str, Any] = {"plain": plain}
    for name, scorer in scorers.items():
        runs[name] = lambda scorer=scorer: scorer(pool.candidates, pool.proxy, interaction=not args.no_interaction)
    seconds = bench.alternate(runs, args.repeats, work.device)
    base = bench.peak_bytes(plain, work.device)
    rows = [{"estimator": "plain", "seconds": bench.ratio(seconds, "plain", "plain")["seconds"], "MiB": base / 2**20}]
    for name in scorers:
        found = bench.ratio(seconds, name, "plain")
        peak = bench.peak_bytes(runs[name], work.device)
        rows.append(
            {
                "estimator": name,
                "tax": found["median"],
                "low": found["low"],
                "high": found["high"],
                "seconds": found["seconds"],
                "memory": peak / base,
            }
        )
    return rows


def fidelity(work: bench.Workbench, args: argparse.Namespace, weights: dict[str, float] | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    pools = [work.pool("mixed", args.candidates, args.proxy, weights)]
    if args.homogeneous:
        pools.append(work.pool(args.homogeneous, args.candidates, args.proxy, {args.homogeneous: 1.0}))
    for pool in pools:
        truth = work.oracle(pool)
        for name in args.estimators:
            scorer = work.scorer(estimator(name, args))
            found = scorer(pool.candidates, pool.proxy, interaction=False).alignment
            assert found is not None
            rows.append({"pool": pool.name, "estimator": name, **bench.fidelity(found, truth)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join("| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tax", "fidelity"])
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-attention-heads", type=int, help="default: hidden size / 64")
    parser.add_argument("--length", type=int, default=512, help="tokens of each sequence, all of them scored")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--proxy", type=int, default=2)
    parser.add_argument("--dim", type=int, default=8192, help="m of the sketch")
    parser.add_argument("--intermediate-dim", type=int, default=65536)
    parser.add_argument("--scope", choices=["layer", "model"], default="layer")
    parser.add_argument("--sketch-seed", type=int, default=42)
    parser.add_argument("--score-micro-batch-size", type=int)
    parser.add_argument("--no-interaction", action="store_true", help="as with selection.redundancy.scale=off")
    parser.add_argument("--estimators", type=lambda x: x.split(","), default=list(ESTIMATORS))
    parser.add_argument("--corpus", help="directory made by tools/prepare_data.py; default: the embedded corpus")
    parser.add_argument("--cache-dir", default="data", help="where the embedded corpus is prepared")
    parser.add_argument("--mixture", help="domain=weight,... of training and of the mixed pool")
    parser.add_argument("--homogeneous", help="a domain for a second pool of nothing else")
    parser.add_argument("--train-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--model-cache", help="file to keep the trained model in")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", help="file for the numbers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
