"""The commands of `tools/bench_scoring.py`: parsed arguments in, rows and tables out."""

from __future__ import annotations

import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opus.backends.engines.processes import init_distributed
from megatron_opus.backends.formats import indexed
from megatron_opus.backends.model.parallel import init_parallel
from megatron_opus.config import ModelConfig, ParallelConfig
from megatron_opus.data.prepare.embedded import prepare_embedded
from megatron_opus.studies.bench import economy, estimators, overhead
from megatron_opus.studies.bench import report as bench_report
from megatron_opus.studies.bench.estimators import FRONTIER, Rows, Say, Sizes, weights_of
from megatron_opus.studies.bench.workbench import Pool, Workbench

# what training and the mixed pool are made of, and the other pool, where the corpus is the embedded one
EMBEDDED_MIXTURE = "prose=0.1,docstrings=0.2,source=0.4,tables=0.3"
EMBEDDED_HOMOGENEOUS = "source"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Rows of one command. keys: the columns that say which row of an earlier run a row replaces."""

    rows: Rows
    keys: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)  # machine, loss of the trained model

    def tables(self, rows: Rows) -> list[tuple[str, Rows]]:
        """(title, rows) of each section, or all rows as one table."""
        sections = list(dict.fromkeys(row.get("section", "") for row in rows))
        return [
            (s, [{k: v for k, v in row.items() if k != "section"} for row in rows if row.get("section", "") == s])
            for s in sections
        ]


def run(args: Namespace, say: Say, save: Callable[[Result], object] = lambda result: None) -> Result:
    """`save` is given what there is after each section of `economy`: a long run that fails has not lost it.

    Raises ValueError, OSError or RuntimeError with what was expected, found, and what to change.
    """
    if args.command == "flops":
        return Result(rows=overhead.of_recipes(args.recipe, args.overrides), keys=("recipe", "optimizer"))
    device = init_distributed(ParallelConfig())
    init_parallel(ParallelConfig(), seed=args.seed)
    if args.corpus is None:
        args.mixture = args.mixture or EMBEDDED_MIXTURE
        args.corpus = prepare_embedded(args.cache_dir, indexed, progress=False)
    model = ModelConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads or max(1, args.hidden_size // 64),
    )
    work = Workbench(model, args.corpus, length=args.length, device=device, seed=args.seed)
    names = list(FRONTIER) if args.estimators == "all" else args.estimators.split(",")
    for name in names:
        _sizes(args).selection(name)  # a name that is none shows before anything is trained

    def result(rows: Rows, keys: tuple[str, ...]) -> Result:
        facts: dict[str, Any] = {"machine": bench_report.machine(device)}
        if len(work.losses) >= 20:
            facts["train_loss"] = [sum(x) / len(x) for x in (work.losses[:10], work.losses[-10:])]
        return Result(rows=rows, keys=keys, facts=facts)

    if args.command == "economy":
        return result(*_economy(work, args, names, say, lambda rows, keys: save(result(rows, keys))))
    return result(*_COMMANDS[args.command](work, args, names, say))


def _tax(work: Workbench, args: Namespace, names: list[str], say: Say) -> tuple[Rows, tuple[str, ...]]:
    _started(work)
    pool = work.pool("mixed", args.candidates, args.proxy, weights_of(args.mixture))
    rows = estimators.tax(work, pool, names, _sizes(args), args.repeats, clock=_clock(args), say=say)
    return [{**_shape(args), **row} for row in rows], (*_SHAPE, "estimator")


def _fidelity(work: Workbench, args: Namespace, names: list[str], say: Say) -> tuple[Rows, tuple[str, ...]]:
    _train(work, args, say)
    pools = _pools(work, args, args.proxy)
    rows = estimators.fidelity(work, pools, names, _sizes(args), say)
    return [{**_shape(args), **row} for row in rows], (*_SHAPE, "pool", "estimator")


def _overhead(work: Workbench, args: Namespace, names: list[str], say: Say) -> tuple[Rows, tuple[str, ...]]:
    if args.chosen > args.candidates:
        raise ValueError(f"--chosen: expected at most the {args.candidates} candidates, got {args.chosen}")
    _started(work)
    pool = work.pool("mixed", args.candidates, args.proxy, weights_of(args.mixture))
    sizes = dataclasses.replace(_sizes(args), length=min(args.score_length, args.length))
    rows = overhead.measured(
        work,
        pool,
        {name: sizes.selection(name) for name in names},
        chosen=args.chosen,
        micro_batch_size=args.micro_batch_size,
        repeats=args.repeats,
        clock=_clock(args),
    )
    shape = {**_shape(args), "N": args.candidates, "K": args.chosen, "K_p": args.proxy, "L_score": sizes.length}
    return [{**shape, **row} for row in rows], (*shape, "step")


def _frontier(work: Workbench, args: Namespace, names: list[str], say: Say) -> tuple[Rows, tuple[str, ...]]:
    pools = _pools(work, args, args.fidelity_proxy)  # before training: only to be timed
    sizes, tax_sequences = _sizes(args), args.tax_candidates + args.proxy
    expected = estimators.expected_seconds(
        work, names, sizes, tax_sequences=tax_sequences, repeats=args.repeats, pools=pools
    )
    cached = work.is_cached(args.train_steps, args.batch_size, weights_of(args.mixture), _cache(args))
    training = 0.0 if cached else args.train_steps * args.batch_size * expected.pop("training sequence")
    parts = {"training": training, "tax": expected["tax"], "fidelity": expected["fidelity"]}
    told = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items())
    say(f"frontier of {len(names)} estimators, expected minutes: {sum(parts.values()) / 60:.1f} ({told})")
    if args.estimate_only:
        return [], _FRONTIER_KEYS
    _train(work, args, say)
    timed = work.pool("mixed", args.tax_candidates, args.proxy, weights_of(args.mixture))
    pools = _pools(work, args, args.fidelity_proxy)
    rows = estimators.frontier(work, timed, pools, names, sizes, args.repeats, clock=_clock(args), say=say)
    return rows, _FRONTIER_KEYS


def _economy(
    work: Workbench, args: Namespace, names: list[str], say: Say, save: Callable[[Rows, tuple[str, ...]], object]
) -> tuple[Rows, tuple[str, ...]]:
    if len(names) != 1:
        raise ValueError(f"--estimators: expected one, the default that savings start from, got {', '.join(names)}")
    if "proxy" in args.sections:
        economy.targets(work, args.oracle_proxy + max(args.proxy_sizes))  # too few shows before the training
    _train(work, args, say)
    pools, clock, default = _pools(work, args, max(args.proxy, 8)), _clock(args), _sizes(args).selection(names[0])
    few = Pool(name="draws", candidates=pools[0].candidates.rows(0, 8), proxy=pools[0].proxy.rows(0, 2))
    parts: dict[str, Callable[[], Rows]] = {
        "savings": lambda: economy.savings(work, pools, default, repeats=args.repeats, clock=clock, say=say),
        "proxy": lambda: economy.proxy_sizes(
            work, pools, default, sizes=args.proxy_sizes, oracle_proxy=args.oracle_proxy, clock=clock, say=say
        ),
        "redundancy": lambda: economy.redundancy(work, pools, default, args.redundancy_dims, say),
        # these change the weights: last
        "stale": lambda: economy.stale_proxy(
            work,
            pools,
            default,
            intervals=args.refresh,
            batch_size=args.batch_size,
            mixture=weights_of(args.mixture),
            clock=clock,
            say=say,
        ),
        "draws": lambda: economy.draws(work, few, default, n=args.draw_candidates, clock=clock),
    }
    rows: Rows = []
    keys = ("section", *_SHAPE, "pool", "saving", "features", "draw")
    for section in (name for name in parts if name in args.sections):
        rows += [{"section": section, **_shape(args), **row} for row in parts[section]()]
        save(rows, keys)
    return rows, keys


_COMMANDS = {"tax": _tax, "fidelity": _fidelity, "overhead": _overhead, "frontier": _frontier}
_SHAPE = ("d", "layers", "T")
_FRONTIER_KEYS = (*_SHAPE, "estimator")


def _shape(args: Namespace) -> dict[str, Any]:
    return dict(zip(_SHAPE, (args.hidden_size, args.num_layers, args.length), strict=True))


def _sizes(args: Namespace) -> Sizes:
    return Sizes(
        length=args.length,
        dim=args.dim,
        intermediate_dim=args.intermediate_dim,
        scope=args.scope,
        seed=args.sketch_seed,
        micro_batch_size=args.score_micro_batch_size,
        interaction=not args.no_interaction,
    )


def _clock(args: Namespace) -> Any:
    return time.process_time if args.clock == "cpu" else time.perf_counter


def _cache(args: Namespace) -> Path:
    return Path(args.model_cache or args.cache_dir / "bench")


def _started(work: Workbench) -> None:
    """One step: before it the geometry is SGD's and there is nothing to precondition with."""
    work.train(1, 1, mixture=None)


def _train(work: Workbench, args: Namespace, say: Say) -> None:
    mixture = weights_of(args.mixture)
    if not work.is_cached(args.train_steps, args.batch_size, mixture, _cache(args)):
        say(f"training {args.train_steps} steps of {args.batch_size} x {args.length} tokens")
    work.train(args.train_steps, args.batch_size, mixture=mixture, cache=_cache(args))


def _pools(work: Workbench, args: Namespace, proxy: int) -> list[Pool]:
    pools = [work.pool("mixed", args.candidates, proxy, weights_of(args.mixture))]
    homogeneous = args.homogeneous
    if homogeneous is None and "source" in work.corpus.domains["candidates"]:
        homogeneous = EMBEDDED_HOMOGENEOUS
    if homogeneous:
        pools.append(work.pool(homogeneous, args.candidates, proxy, {homogeneous: 1.0}))
    return pools
