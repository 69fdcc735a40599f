"""Measure how well a proxy of few sequences stands for many: larger batches, batches that are kept, a momentum.

The proxy text is cut in two parts that share no sequence. The truth is the exact alignment with all sequences of the
one, and batches are drawn from the other as a run draws them: windows of `score_length` tokens in a shuffled order.
The model goes on training, and at each step every setting scores the same candidates at the same weights.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_opus.config import SelectionConfig
from megatron_opus.scoring.scoring_pass import ScoringPass
from megatron_opus.studies.bench import workbench
from megatron_opus.studies.bench.estimators import Rows, Say, Sizes
from megatron_opus.studies.bench.workbench import Clock, Pool, Workbench
from megatron_opus.types import Batch

ESTIMATOR = "one_sided:64"  # as shipped
BASE = {"proxy_batch_size": 8}  # the default, whose time is 1
SETTINGS: tuple[Mapping[str, Any], ...] = (
    {"proxy_batch_size": 2},
    BASE,
    {"proxy_batch_size": 16},
    {"proxy_batch_size": 32},
    *({**BASE, "proxy_momentum": beta} for beta in (0.5, 0.9, 0.95)),
    {"proxy_batch_size": 16, "proxy_refresh_every": 2},
    {"proxy_batch_size": 64, "proxy_refresh_every": 8},
)
TIMED_PASSES = 8  # in a row: every proxy_refresh_every divides it
MICRO_BATCH = 64  # sequences; pools and truth need not fit in memory at once


def fidelity(
    work: Workbench,
    pools: Sequence[Pool],
    batches: Sequence[Batch],
    sizes: Sizes,
    *,
    proxy: int,
    warm_up: int,
    settings: Sequence[Mapping[str, Any]] = SETTINGS,
    say: Say = lambda text: None,
) -> Rows:
    """Train on `batches` and return a row of mean Spearman correlations with the truth for each setting.

    The first pool is the mixed one, the others are domains. `within` is the mean over the domains, `low` and `high` are
    its range. The truth reads the window of every candidate that the settings read, and under `whole` all its tokens.
    It is of `proxy` sequences, or of half of them where the corpus has fewer than twice as many. The first `warm_up`
    steps are not counted: they fill the averages.
    """
    candidates = Batch.cat([pool.candidates for pool in pools])
    target, text = parts_of_proxy(work, proxy)
    say(f"truth: {len(target)} proxy sequences of {work.length} tokens; batches come from {len(text)} others")
    text = windows(text, sizes.length)
    scorers = [work.scorer(_selection(sizes, ESTIMATOR, setting)) for setting in settings]
    exact = {"": sizes, "whole ": dataclasses.replace(sizes, length=work.length)}
    found: dict[tuple[int, str], list[list[float]]] = defaultdict(list)  # of every step, a number for each pool
    for step, batch in enumerate(batches):
        counted = step >= warm_up
        scored = candidates if counted else candidates.rows(0, 1)
        truths = {name: truth(work, scored, target, read) for name, read in exact.items() if counted}
        for number, scorer in enumerate(scorers):
            alignment = _alignment(scorer, scored, drawn(text, step, settings[number]["proxy_batch_size"], work.seed))
            for name, true in truths.items():
                found[number, name].append(_spearman(alignment, true, pools))
        say(f"step {step + 1} of {len(batches)}: loss {work.update(batch, len(batch)):.3f}")
    rows: Rows = []
    for number, setting in enumerate(settings):
        row = {"proxy_batch_size": 8, "proxy_momentum": 0.0, "proxy_refresh_every": 1} | dict(setting)
        for name in exact:
            mixed, *domains = (statistics.mean(steps) for steps in zip(*found[number, name], strict=True))
            row |= {f"{name}mixed": mixed, f"{name}within": statistics.mean(domains)}
            row |= {f"{name}low": min(domains), f"{name}high": max(domains)}
        rows.append(row)
    return rows


def cost(work: Workbench, candidates: Batch, sizes: Sizes, repeats: int, *, clock: Clock = time.perf_counter) -> Rows:
    """Return a row for each of `SETTINGS`: seconds of its passes over those of `BASE`, between which it alternates."""
    text = windows(parts_of_proxy(work, 1)[1], sizes.length)

    def passes(setting: Mapping[str, Any]) -> Callable[[], None]:
        scorer = work.scorer(dataclasses.replace(sizes.selection(ESTIMATOR), **setting))

        def run() -> None:
            for step in range(TIMED_PASSES):
                scorer(candidates, drawn(text, step, setting["proxy_batch_size"], work.seed))

        return run

    rows: Rows = []
    for setting in SETTINGS:
        runs = {"setting": passes(setting), "base": passes(BASE)}
        found = workbench.ratio(workbench.alternate(runs, repeats, work.device, clock), "setting", "base")
        rows.append({"time": found["median"], "time low": found["low"], "time high": found["high"]})
    return rows


def truth(work: Workbench, candidates: Batch, target: Batch, sizes: Sizes) -> torch.Tensor:
    """Align candidates [N, L], read over `sizes.length` tokens, with the whole target, without a sketch: [N]."""
    scorer = work.scorer(_selection(sizes, "direction-exact", {}))
    return _alignment(scorer, candidates, windows(target, sizes.length))


def parts_of_proxy(work: Workbench, count: int) -> tuple[Batch, Batch]:
    """`count` shuffled proxy sequences for the truth, at most half of them, and all others."""
    ids = work.corpus.proxy_ids(0, int(work.corpus.sequences("proxy").sum()), work.seed)
    count = min(count, len(ids) // 2)
    return (work.corpus.batch(ids[:count]).to(work.device), work.corpus.batch(ids[count:]).to(work.device))


def windows(batch: Batch, length: int) -> Batch:
    """Cut sequences [B, L] into sequences of their own [B * (L // length), length], as a run cuts its proxy."""
    starts = range(0, batch.tokens.shape[1] - length + 1, length)
    cut = Batch.cat([batch.window(length, start) for start in starts])
    return dataclasses.replace(cut, position_ids=cut.position_ids % length)


def drawn(text: Batch, step: int, count: int, seed: int) -> Batch:
    """The proxy batch of a step: the text is walked in a shuffled order, shuffled again when too little is left."""
    epoch, turn = divmod(step, len(text) // count)
    order = np.random.default_rng([seed, epoch]).permutation(len(text))
    rows = torch.from_numpy(order[turn * count : (turn + 1) * count]).to(text.tokens.device)
    return text.map(lambda x: x[rows])


def _selection(sizes: Sizes, estimator: str, setting: Mapping[str, Any]) -> SelectionConfig:
    micro = sizes.micro_batch_size or MICRO_BATCH
    return dataclasses.replace(sizes.selection(estimator), score_micro_batch_size=micro, **setting)


def _alignment(scorer: ScoringPass, candidates: Batch, proxy: Batch) -> torch.Tensor:
    alignment = scorer(candidates, proxy, interaction=False).alignment
    assert alignment is not None
    return alignment


def _spearman(alignment: torch.Tensor, truth: torch.Tensor, pools: Sequence[Pool]) -> list[float]:
    counts = [len(pool.candidates) for pool in pools]
    pairs = zip(alignment.split(counts), truth.split(counts), strict=True)
    return [workbench.fidelity(a, b)["spearman"] for a, b in pairs]
