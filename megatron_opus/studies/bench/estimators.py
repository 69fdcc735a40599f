"""Estimators by name, and what each costs and how well it ranks: `tax`, `fidelity` and their `frontier`.

A name is a kind and a size: `two_sided:8192` (m, numbers of the sketch), `one_sided:64` (buckets of the sketched side).
Settings that save scored tokens may follow it: `one_sided:64+score_length=128+score_windows=2`.
`features` of a kind that reads the alignment off the sketch are one sketch for each layer; where the alignment comes
from elsewhere they serve the redundancy alone, and are one sketch of all layers, as in the recipes.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from megatron_opus.config import ConfigError, PreconditionerConfig, RedundancyConfig, SelectionConfig, SketchConfig
from megatron_opus.studies.bench import workbench
from megatron_opus.studies.bench.workbench import Clock, Pool, Workbench
from megatron_opus.types import Batch

# kind -> (operator, alignment, form)
KINDS = {
    "materialise": ("materialise", "features", "separable"),
    "materialise-exact": ("materialise", "features", "exact"),
    "two_sided": ("two_sided", "features", "separable"),
    "two_stage": ("two_stage", "features", "separable"),
    "one_sided": ("two_sided", "one_sided", "separable"),
    "direction": ("two_sided", "direction", "separable"),
    "direction-exact": ("materialise", "direction", "exact"),
}
# The frontier: every kind over its range, the dear ones at fewer sizes.
FRONTIER = (
    *(f"one_sided:{s}" for s in (16, 32, 64, 128, 256)),
    *(f"two_sided:{m}" for m in (1024, 4096, 8192, 16384)),
    *(f"two_stage:{m}" for m in (1024, 8192)),
    *(f"materialise:{m}" for m in (1024, 8192, 16384)),
    "direction",
)
# what may stand behind a name: settings of `selection` that make a pass read less, or read it more cheaply
SAVINGS = (
    "score_length", "score_windows", "score_window", "scored_layers", "score_output_layer", "score_precision",
    "score_micro_batch_size",
)  # fmt: skip
FIDELITY_MICRO_BATCH = 16  # sequences; the pools need not fit in memory at once
GROUP = 3  # estimators between two plain passes: further apart, the machine is another one

Rows = list[dict[str, Any]]
Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What every estimator of one table shares. scope: None for the rule above."""

    length: int
    dim: int = 8192
    intermediate_dim: int = 65536
    scope: Any = None
    seed: int = 42
    micro_batch_size: int | None = None
    interaction: bool = True

    def selection(self, name: str) -> SelectionConfig:
        """Raises ValueError for a name that is none."""
        estimator, *savings = name.split("+")
        kind, _, size = estimator.partition(":")
        if kind not in KINDS or (size and (not size.isdecimal() or kind.startswith("direction"))):
            raise ConfigError(
                f"estimator {name!r}: expected one of {', '.join(KINDS)}, with a size as in two_sided:8192 or "
                "one_sided:64 (direction has none)"
            )
        operator, alignment, form = KINDS[kind]
        features = alignment == "features"
        sketch = SketchConfig(
            operator=operator,  # type: ignore[arg-type]
            alignment=alignment,  # type: ignore[arg-type]
            dim=int(size) if size and features else self.dim,
            one_sided_dim=int(size) if size and kind == "one_sided" else SketchConfig.one_sided_dim,
            intermediate_dim=self.intermediate_dim,
            scope=self.scope or ("layer" if features else "model"),
            seed=self.seed,
        )
        selection = SelectionConfig(
            sketch=sketch,
            preconditioner=PreconditionerConfig(form=form),  # type: ignore[arg-type]
            redundancy=RedundancyConfig(scale="matched" if self.interaction else "off"),
            score_length=self.length,
            score_micro_batch_size=self.micro_batch_size,
        )
        return dataclasses.replace(selection, **dict(_saving(name, text) for text in savings))


def _saving(name: str, text: str) -> tuple[str, Any]:
    """Read `key=value` behind an estimator's name. Raises ValueError for a key that saves no scored tokens."""
    key, found, value = text.partition("=")
    if key not in SAVINGS or not found:
        raise ConfigError(
            f"estimator {name!r}: expected + and key=value with one of {', '.join(SAVINGS)}, got {text!r}"
        )
    return key, yaml.safe_load(value)


def plain(work: Workbench, pool: Pool, micro_batch_size: int | None) -> Callable[[], None]:
    """The passes that scoring this pool cannot do without, over candidates and proxy together."""
    together = Batch.cat([pool.candidates, pool.proxy])
    micro = micro_batch_size or len(together)

    def run() -> None:
        for first in range(0, len(together), micro):
            work.plain(together.rows(first, min(first + micro, len(together))))

    return run


def tax(
    work: Workbench,
    pool: Pool,
    names: Sequence[str],
    sizes: Sizes,
    repeats: int,
    *,
    memory: bool = True,
    clock: Clock = time.perf_counter,
    say: Say = lambda text: None,
) -> Rows:
    """A row for the plain pass and for each estimator; memory: with its peak, which takes one more run of each."""
    base = plain(work, pool, sizes.micro_batch_size)
    base_bytes = workbench.peak_bytes(base, work.device) if memory else 0
    rows: Rows = []
    base_seconds: list[float] = []
    for first in range(0, len(names), GROUP):
        runs: dict[str, Callable[[], object]] = {"plain": base}
        for name in names[first : first + GROUP]:
            scorer = work.scorer(sizes.selection(name))
            runs[name] = functools.partial(
                scorer, pool.candidates, pool.proxy, interaction=sizes.interaction, window_seed=work.seed
            )
        seconds = workbench.alternate(runs, repeats, work.device, clock)
        base_seconds += seconds["plain"]
        for name in list(runs)[1:]:
            found = workbench.ratio(seconds, name, "plain")
            row = {"estimator": name, "tax": found["median"], "low": found["low"], "high": found["high"]}
            row["seconds"] = found["seconds"]
            if memory:
                row["memory"] = workbench.peak_bytes(runs[name], work.device) / base_bytes
            rows.append(row)
            say(f"tax {name}: {row['tax']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
    first_row: dict[str, Any] = {"estimator": "plain", "seconds": statistics.median(base_seconds)}
    return [{**first_row, **({"MiB": base_bytes / 2**20} if memory else {})}, *rows]


def fidelity(
    work: Workbench,
    pools: Sequence[Pool],
    names: Sequence[str],
    sizes: Sizes,
    say: Say = lambda text: None,
) -> Rows:
    """A row for each pool and estimator: its alignment against the oracle's, with the same proxy on both sides.

    The pools are read together; they must share their proxy (ValueError).
    """
    if any(not torch.equal(pool.proxy.tokens, pools[0].proxy.tokens) for pool in pools):
        raise ValueError("fidelity: expected pools with the same proxy sequences, got different ones")
    together = Pool(name="", candidates=Batch.cat([pool.candidates for pool in pools]), proxy=pools[0].proxy)
    counts = [len(pool.candidates) for pool in pools]
    truths = work.oracle(together).split(counts)
    rows: Rows = []
    for name in names:
        selection = sizes.selection(name)
        micro = selection.score_micro_batch_size or FIDELITY_MICRO_BATCH
        scorer = work.scorer(dataclasses.replace(selection, score_micro_batch_size=micro))
        alignment = scorer(together.candidates, together.proxy, interaction=False, window_seed=work.seed).alignment
        assert alignment is not None
        for pool, found, truth in zip(pools, alignment.split(counts), truths, strict=True):
            rows.append({"pool": pool.name, "estimator": name, **workbench.fidelity(found, truth)})
            say(f"fidelity {name}, {pool.name} pool: Spearman {rows[-1]['spearman']:.3f}")
    return rows


def frontier(
    work: Workbench,
    tax_pool: Pool,
    pools: Sequence[Pool],
    names: Sequence[str],
    sizes: Sizes,
    repeats: int,
    *,
    clock: Clock = time.perf_counter,
    say: Say = lambda text: None,
) -> Rows:
    """A row for each estimator with its tax, and its fidelity in each pool under `POOL spearman` and so on."""
    cost = {r["estimator"]: r for r in tax(work, tax_pool, names, sizes, repeats, memory=False, clock=clock, say=say)}
    rows = [cost[name] for name in names]
    found = {(r["pool"], r["estimator"]): r for r in fidelity(work, pools, names, sizes, say)}
    for row in rows:
        for pool in pools:
            row |= {
                f"{pool.name} {key}": found[pool.name, row["estimator"]][key]
                for key in ("spearman", "pearson", "top_k")
            }
    return rows


def weights_of(text: str | None) -> Mapping[str, float] | None:
    """`domain=weight,...`. Raises ValueError."""
    if not text:
        return None
    try:
        return {name: float(value) for name, value in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise ConfigError(f"mixture {text!r}: expected domain=weight,..., as in prose=0.2,source=0.8") from None
