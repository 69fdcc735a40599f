"""Run the commands of `tools/bench_scoring.py`: parsed arguments in, rows of a table out."""

from __future__ import annotations

import dataclasses
import time
from argparse import Namespace
from typing import Any

from megatron_opus.backends.engines.processes import init_distributed
from megatron_opus.backends.formats import indexed
from megatron_opus.backends.model.parallel import init_parallel
from megatron_opus.config import ConfigError, ModelConfig, ParallelConfig
from megatron_opus.data.prepare.embedded import prepare_embedded
from megatron_opus.studies.bench import estimators, overhead, proxies
from megatron_opus.studies.bench.estimators import FRONTIER, Rows, Say, Sizes, weights_of
from megatron_opus.studies.bench.workbench import Clock, Pool, Workbench
from megatron_opus.types import Batch

# the mixture of training and of the mixed pool, and the domain of the other pool, where the corpus is the embedded one
EMBEDDED_MIXTURE = "prose=0.1,docstrings=0.2,source=0.4,tables=0.3"
EMBEDDED_HOMOGENEOUS = "source"


def run(args: Namespace, say: Say) -> Rows:
    """Measure what `args.command` names and return the rows of its table.

    Raises ValueError, OSError or RuntimeError with what was expected, what was found, and what to change.
    """
    if args.command == "flops":
        return overhead.of_recipes(args.recipe, args.overrides)
    sizes = _sizes(args)
    asked = getattr(args, "estimators", proxies.ESTIMATOR)
    names = list(FRONTIER) if asked == "all" else asked.split(",")
    for name in names:
        sizes.selection(name)  # a wrong name is refused before anything is trained
    mixture = weights_of(args.mixture)
    if args.command == "overhead" and args.chosen > args.candidates:
        raise ConfigError(f"--chosen: expected at most the {args.candidates} candidates, got {args.chosen}")
    if args.command == "proxy" and args.warm_up_steps >= args.further_steps:
        raise ConfigError(f"--warm-up-steps: expected fewer than --further-steps, {args.further_steps}")
    device = init_distributed(ParallelConfig())
    init_parallel(ParallelConfig(), seed=args.seed)
    corpus = args.corpus
    if corpus is None:
        mixture = mixture or weights_of(EMBEDDED_MIXTURE)
        corpus = prepare_embedded(args.cache_dir, indexed, progress=False)
    model = ModelConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads or max(1, args.hidden_size // 64),
        untie_embeddings_and_output_weights=args.untie_embeddings_and_output_weights,
    )
    work = Workbench(model, corpus, length=args.length, device=device, seed=args.seed)
    clock: Clock = time.process_time if args.clock == "cpu" else time.perf_counter
    if args.command in ("tax", "overhead"):
        # one step: before it there is no optimizer state to precondition with
        work.train(1, 1, mixture=None)
    else:
        say(f"training {args.train_steps} steps of {args.batch_size} x {args.length} tokens")
        further = args.further_steps if args.command == "proxy" else 0
        batches = work.train(args.train_steps, args.batch_size, mixture=mixture, further=further)
    pool = work.pool("mixed", args.candidates, 1 if args.command == "proxy" else args.proxy, mixture)
    if args.command == "proxy":
        rows = _proxies(work, pool, batches, args, mixture, clock, say)
    elif args.command == "tax":
        rows = estimators.tax(work, pool, names, sizes, args.repeats, clock=clock, say=say)
    elif args.command == "overhead":
        sizes = dataclasses.replace(sizes, length=min(args.score_length, args.length))
        rows = overhead.measured(
            work,
            pool,
            {name: sizes.selection(name) for name in names},
            chosen=args.chosen,
            micro_batch_size=args.micro_batch_size,
            repeats=args.repeats,
            clock=clock,
        )
    elif args.command == "fidelity":
        rows = estimators.fidelity(work, _pools(work, args, mixture, args.proxy), names, sizes, say)
    else:
        timed = work.pool("mixed", args.tax_candidates, args.proxy, mixture)
        pools = _pools(work, args, mixture, args.fidelity_proxy)
        rows = estimators.frontier(work, timed, pools, names, sizes, args.repeats, clock=clock, say=say)
    shape = {"d": args.hidden_size, "layers": args.num_layers, "T": args.length}
    return [{**shape, **row} for row in rows]


def _proxies(
    work: Workbench, mixed: Pool, batches: list[Batch], args: Namespace, mixture: Any, clock: Clock, say: Say
) -> Rows:
    """A row for each setting of the proxy, in the mixed pool and in one of each of its domains."""
    sizes = dataclasses.replace(_sizes(args), length=min(args.score_length, args.length))
    shares = work.corpus.candidate_weights(mixture)
    domains = [name for name, share in zip(work.corpus.domains["candidates"], shares, strict=True) if share]
    pools = [mixed, *(work.pool(name, args.domain_candidates, 1, {name: 1.0}) for name in domains)]
    times = proxies.cost(work, mixed.candidates.rows(0, args.tax_candidates), sizes, args.repeats, clock=clock)
    rows = proxies.fidelity(work, pools, batches, sizes, proxy=args.proxy, warm_up=args.warm_up_steps, say=say)
    return [{**row, **found} for row, found in zip(rows, times, strict=True)]


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


def _pools(work: Workbench, args: Namespace, mixture: Any, proxy: int) -> list[Pool]:
    """A pool of the training mixture, and one of a single domain where the corpus has it."""
    pools = [work.pool("mixed", args.candidates, proxy, mixture)]
    homogeneous = args.homogeneous
    if homogeneous is None and EMBEDDED_HOMOGENEOUS in work.corpus.domains["candidates"]:
        homogeneous = EMBEDDED_HOMOGENEOUS
    if homogeneous:
        pools.append(work.pool(homogeneous, args.candidates, proxy, {homogeneous: 1.0}))
    return pools
