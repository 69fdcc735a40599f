"""What fewer and cheaper tokens cost in fidelity, and save in time, on a trained model.

The truth is always the float64 oracle over whole windows, all matrices and the proxy named; `time` is a pass with the
saving / a pass with the default, neighbours in time. Rank correlation is not all: a stale proxy ranks well and may
train worse, so that the choice among these is made by training runs (tools/experiment.py).
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_opus.config import SelectionConfig
from megatron_opus.layout.model_layout import scored_blocks
from megatron_opus.selection import sampling
from megatron_opus.studies.bench import workbench
from megatron_opus.studies.bench.estimators import GROUP, Rows, Say
from megatron_opus.studies.bench.workbench import Clock, Pool, Workbench
from megatron_opus.types import Batch, Signals

SUBSETS = 200  # random proxy batches whose fidelity is taken
HALVES = 32  # random half-filled batches of the redundancy


def silent(text: str) -> None:
    pass


def variants(default: SelectionConfig, length: int, blocks: int) -> dict[str, SelectionConfig]:
    """`key=value, ...` -> the default with it: every saving of tokens that a recipe can ask for."""
    changes: list[dict[str, Any]] = [{"score_length": length // n} for n in (2, 4, 8)]
    changes += [{"score_length": length // 4, "score_windows": 2}, {"score_length": length // 8, "score_windows": 4}]
    changes += [{**x, "score_window": "random"} for x in changes[3:]]
    seen = {tuple(range(blocks))}
    for which in ("last:1", f"last:{max(1, blocks // 2)}", "every:2", "every:4"):
        if int(which.partition(":")[2]) <= blocks:
            chosen = tuple(sorted(scored_blocks(range(blocks), which)))
            changes += [] if chosen in seen else [{"scored_layers": which}]
            seen.add(chosen)
    changes.append({"score_precision": "bf16"})
    changes += [{"score_micro_batch_size": size} for size in (1, 4, 8)]
    return {", ".join(f"{k}={v}" for k, v in x.items()): dataclasses.replace(default, **x) for x in changes}


def savings(
    work: Workbench,
    pools: Sequence[Pool],
    default: SelectionConfig,
    *,
    repeats: int = 1,
    clock: Clock = time.perf_counter,
    say: Say = silent,
) -> Rows:
    """A row for the default and for each of `variants`, in each pool.

    difference, of what reads the same tokens: of the alignment from the default's, relative; for chunks it is rounding.
    """
    rows: Rows = []
    chosen = variants(default, work.length, work.config.num_layers)
    for pool in pools:
        truth = work.oracle(pool)
        runs = {name: _scoring(work, config, pool) for name, config in {"default": default, **chosen}.items()}
        base = runs["default"]()
        rows.append({"pool": pool.name, "saving": "default", **_fidelity(base, truth), "time": 1.0})
        names = list(chosen)
        for first in range(0, len(names), GROUP):
            group = ["default", *names[first : first + GROUP]]
            found: dict[str, Signals] = {}
            seconds: dict[str, list[float]] = {name: [] for name in group}
            for _ in range(repeats):
                for name in group:
                    seconds[name].append(workbench.timed(_keep(found, name, runs[name]), work.device, clock))
            for name in group[1:]:
                cost = workbench.ratio(seconds, name, "default")["median"]
                row = {"pool": pool.name, "saving": name, **_fidelity(found[name], truth)}
                same = name.startswith(("score_precision", "score_micro_batch_size"))
                difference = {"difference": _relative(found[name].alignment, base.alignment)} if same else {}
                rows.append({**row, "time": cost, **difference})
                say(f"{name}, {pool.name} pool: Spearman {row['spearman']:.3f}, time {cost:.2f}")
    return rows


def proxy_sizes(
    work: Workbench,
    pools: Sequence[Pool],
    default: SelectionConfig,
    *,
    sizes: Sequence[int],
    oracle_proxy: int,
    clock: Clock = time.perf_counter,
    say: Say = silent,
) -> Rows:
    """Proxy batches of each size against `oracle_proxy` other sequences of the target; exact alignments on both sides.

    Median and quartiles over random batches. Sequences are the corpus's proxy pool and the validation text of its
    domains. Raises ValueError where there are too few.
    """
    target = targets(work, oracle_proxy + max(sizes))
    rows: Rows = []
    for pool in pools:
        pairs = work.oracle_pairs(pool.candidates, target)
        truth, rest = pairs[:, :oracle_proxy].mean(1), pairs[:, oracle_proxy:]
        generator = torch.Generator().manual_seed(work.seed)
        own = target.rows(oracle_proxy, len(target))
        usual = _scoring(work, default, dataclasses.replace(pool, proxy=own.rows(0, min(8, max(sizes)))))
        usual()
        for size in sizes:
            found = [
                workbench.spearman(rest[:, torch.randperm(rest.shape[1], generator=generator)[:size]].mean(1), truth)
                for _ in range(SUBSETS if size < rest.shape[1] else 1)
            ]
            low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
            run = _scoring(work, default, dataclasses.replace(pool, proxy=own.rows(0, size)))
            cost = workbench.timed(run, work.device, clock) / workbench.timed(usual, work.device, clock)
            row = {"pool": pool.name, "saving": f"proxy_batch_size={size}", "spearman": middle, "low": low}
            rows.append({**row, "high": high, "time": cost})
            say(f"proxy_batch_size={size}, {pool.name} pool: Spearman {middle:.3f} ({low:.3f} to {high:.3f})")
    return rows


def targets(work: Workbench, count: int) -> Batch:
    """`count` sequences of the target that training has not seen: proxy, then validation. Raises ValueError."""
    corpus = work.corpus
    ids = [corpus.proxy_ids(0, int(corpus.sequences("proxy").sum()), work.seed)]
    known = set(corpus.domains["validation"])
    ids += [corpus.validation_ids(name, count) for name in corpus.domains["proxy"] if name in known]
    found = np.concatenate(ids)
    if len(found) < count:
        raise ValueError(
            f"oracle proxy and largest proxy batch: expected {count} sequences of {work.length} tokens in the corpus's "
            f"proxy and validation text, got {len(found)}; lower --oracle-proxy, --proxy-sizes or --length, or name a "
            "larger --corpus"
        )
    # both kinds on both sides
    order = np.random.default_rng(work.seed).permutation(len(found))[:count]
    return corpus.batch(found[order]).to(work.device)


def stale_proxy(
    work: Workbench,
    pools: Sequence[Pool],
    default: SelectionConfig,
    *,
    intervals: Sequence[int],
    batch_size: int,
    mixture: Mapping[str, float] | None,
    clock: Clock = time.perf_counter,
    say: Say = silent,
) -> Rows:
    """The proxy's direction as at the end of each refresh interval, `interval` - 1 updates ago; trains the model.

    The truth has the weights of now and the same proxy sequences. time: mean over the interval.
    """
    scorers: dict[tuple[str, int], Any] = {}
    done, last = 0, max(intervals) - 1
    for interval in sorted(set(intervals), reverse=True):
        work.train_on(last - (interval - 1) - done, batch_size, mixture)
        done = last - (interval - 1)
        for pool in pools:
            scorer = work.scorer(dataclasses.replace(default, proxy_refresh_every=interval))
            scorers[pool.name, interval] = scorer
            if interval > 1:
                scorer(pool.candidates.rows(0, 1), pool.proxy, interaction=False)
    rows: Rows = []
    for pool in pools:
        truth = work.oracle(pool)
        fresh = _scoring(work, default, pool)
        fresh()
        for interval in intervals:
            found: dict[str, Signals] = {}
            scorer = scorers[pool.name, interval]
            reuse = functools.partial(scorer, pool.candidates, pool.proxy, interaction=_wanted(default))
            stale = workbench.timed(_keep(found, "", reuse), work.device, clock)
            if found[""].proxy_read != (interval == 1):
                raise RuntimeError(f"proxy_refresh_every={interval}: the pass did not use the proxy of earlier weights")
            usual = workbench.timed(fresh, work.device, clock)
            cost = ((interval - 1) * stale / usual + 1) / interval
            row = {"pool": pool.name, "saving": f"proxy_refresh_every={interval}", **_fidelity(found[""], truth)}
            rows.append({**row, "updates since": interval - 1, "time": cost})
            say(f"proxy_refresh_every={interval}, {pool.name} pool: Spearman {row['spearman']:.3f}")
    return rows


def redundancy(
    work: Workbench, pools: Sequence[Pool], default: SelectionConfig, dims: Sequence[int], say: Say = silent
) -> Rows:
    """Interaction terms of smaller sketches against one without collisions (every row and column its own bucket).

    entries: Pearson of <P G(z), P G(j)>, z < j. redundancy: Spearman of the sum over a quarter of the pool, half of the
    K = N / 2 to be drawn, among the others; median of random quarters. numbers: kept for each candidate.
    """
    widest = max(max(x.d_out, x.d_in) for x in work.layers)
    rows: Rows = []
    for pool in pools:
        truth = _interaction(work, default, pool, "features", "layer", 4 ** (widest - 1).bit_length())
        n = len(truth)
        above = torch.triu_indices(n, n, 1).unbind()
        for scope in ("layer", "model"):
            for dim in dims:
                found = _interaction(work, default, pool, default.sketch.alignment, scope, dim)
                ranks = []
                for seed in range(HALVES):
                    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
                    drawn, others = order[: max(1, n // 4)], order[max(1, n // 4) :]
                    sums = (x[others][:, drawn].sum(1) for x in (found, truth))
                    ranks.append(workbench.spearman(*sums))
                row = {"pool": pool.name, "features": f"scope {scope}, m = {dim}"}
                numbers = dim * (len(work.layers) if scope == "layer" else 1)
                entries = workbench.correlation(found[above], truth[above])
                rows.append({**row, "numbers": numbers, "entries": entries, "redundancy": statistics.median(ranks)})
                say(f"redundancy, scope {scope}, m = {dim}, {pool.name} pool: {rows[-1]['redundancy']:.3f}")
    return rows


def draws(
    work: Workbench,
    pool: Pool,
    default: SelectionConfig,
    *,
    n: int = 1024,
    repeats: int = 9,
    clock: Clock = time.perf_counter,
) -> Rows:
    """Seconds of drawing n / 2 of n, and as a share of a step that scores n and updates on n / 2 sequences.

    The step is not run at that size: its seconds for each sequence are those of this pool, scored and updated on. The
    sequences, and so their utilities, are random: the time does not depend on them.
    """
    generator = torch.Generator().manual_seed(work.seed)
    align = torch.randn(n, generator=generator, dtype=torch.float64)
    features = torch.randn(n, 256, generator=generator, dtype=torch.float64)
    inter = features @ features.T
    k = max(1, len(pool.candidates) // 2)
    draw = functools.partial(sampling.draw, align, k=n // 2, generator=generator, temperature=0.9)
    runs: dict[str, Callable[[], object]] = {
        "score": _scoring(work, default, pool),
        "update": lambda: work.update(pool.candidates.rows(0, k), k),
        "without redundancy": functools.partial(draw, inter=None),
        "with redundancy": functools.partial(draw, inter=inter, redundancy_scale=1e-3),
    }
    seconds = workbench.alternate(runs, repeats, work.device, clock)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    scored = len(pool.candidates) + len(pool.proxy)
    step = middle["score"] / scored * n + middle["update"] / k * (n // 2)
    return [
        {"draw": f"{n // 2} of {n}, {name}", "ms": 1000 * middle[name], "share of a step": middle[name] / step}
        for name in ("without redundancy", "with redundancy")
    ]


# --- parts ----------------------------------------------------------------------------------------------------------


def _scoring(work: Workbench, config: SelectionConfig, pool: Pool) -> Callable[[], Signals]:
    scorer = work.scorer(config)
    return lambda: scorer(pool.candidates, pool.proxy, interaction=_wanted(config), window_seed=work.seed)


def _wanted(config: SelectionConfig) -> bool:
    return config.redundancy.scale != "off"


def _keep(found: dict[str, Signals], name: str, run: Callable[[], Signals]) -> Callable[[], None]:
    def kept() -> None:
        found[name] = run()

    return kept


def _fidelity(found: Signals, truth: Tensor) -> dict[str, float]:
    assert found.alignment is not None
    return workbench.fidelity(found.alignment, truth)


def _relative(found: Tensor | None, base: Tensor | None) -> float:
    assert found is not None
    assert base is not None
    return ((found - base).norm() / base.norm()).item()


def _interaction(work: Workbench, default: SelectionConfig, pool: Pool, alignment: str, scope: str, dim: int) -> Tensor:
    sketch = dataclasses.replace(default.sketch, alignment=alignment, scope=scope, dim=dim, operator="two_sided")  # type: ignore[arg-type]
    found = work.scorer(dataclasses.replace(default, sketch=sketch))(pool.candidates, pool.proxy).interaction
    assert found is not None
    return found
