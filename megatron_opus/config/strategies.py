"""Settings of the strategies other than OPUS itself, and what can be refused about them before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_opus.config.schema import ConfigError

Strategy = Literal["opus", "random", "high_ppl", "middle_ppl", "low_ppl", "greats", "ado", "filter_then_weight"]
PERPLEXITY: tuple[Strategy, ...] = ("high_ppl", "middle_ppl", "low_ppl")
GHOST: tuple[Strategy, ...] = ("opus", "greats", "filter_then_weight")  # score with gradients
ROUNDING = 1e-9  # 0.3 of 10 sequences are 3


@dataclass(frozen=True, kw_only=True)
class AdoConfig:
    """Domain shares of the buffer from online scaling laws (arXiv 2410.11820). Steps are optimizer steps."""

    enabled: bool = False  # beside any strategy, which selects in the buffer that ADO fills; `ado` is random + ADO
    skip_steps: int = 500  # first losses left out of every fit
    first_fit: int = 1000  # until then the configured domain weights
    refit_every: int = 1000
    block_steps: int = 10  # losses are averaged over so many steps: one point of the curve
    min_log_epsilon: float = 0.5  # lower bound of the irreducible loss, log nats
    preference: float = 0.1  # share of the newest preference in the policy; the rest is its running mean
    credit: float = 0.1  # weight of the newest policy in the history h
    credit_power: float = 0.5  # preference is proportional to h to this power
    min_share: float = 0.01  # no domain with a weight gets less


@dataclass(frozen=True, kw_only=True)
class FilterThenWeightConfig:
    """Non-negative least squares on the K kept sequences."""

    max_sweeps: int = 1000  # of coordinate descent
    tolerance: float = 1e-10  # largest change of a weight in a sweep, relative to the largest weight


@dataclass(frozen=True, kw_only=True)
class FloorsConfig:
    """Shares of the K selected sequences that domains are sure of, and that they never exceed."""

    # hash=False: settings are kept in sets and caches, which a dict would refuse
    minimum: dict[str, float] = field(default_factory=dict, hash=False)  # candidate domain -> share, rounded up
    maximum: dict[str, float] = field(default_factory=dict, hash=False)  # candidate domain -> share, rounded down


def least(share: float, k: int) -> int:
    return math.ceil(share * k - ROUNDING)


def most(share: float, k: int) -> int:
    return math.floor(share * k + ROUNDING)


def check_floors(floors: FloorsConfig, k: int, domains: tuple[str, ...] | None = None) -> None:
    """Raise ConfigError for bounds that no selection of k can satisfy; with `domains` also for unknown names."""
    low, high = floors.minimum, floors.maximum
    for key, shares in (("minimum", low), ("maximum", high)):
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"selection.floors.{key}.{name}: expected a share between 0 and 1, got {share}")
            if domains is not None and name not in domains:
                raise ConfigError(f"selection.floors.{key}: no candidate domain {name!r}; there are {list(domains)}")
    for name in sorted({*low} & {*high}):
        if least(low[name], k) > most(high[name], k):
            raise ConfigError(
                f"selection.floors: {name} is to have at least {least(low[name], k)} and at most "
                f"{most(high[name], k)} of {k} sequences ({low[name]:g} rounded up, {high[name]:g} rounded down)"
            )
    owed = sum(least(share, k) for share in low.values())
    if owed > k:
        raise ConfigError(
            f"selection.floors.minimum: asks for {owed} of {k} sequences, each share rounded up; lower a share or "
            "raise training.global_batch_size"
        )
    if domains is not None and all(name in high for name in domains):
        room = sum(most(share, k) for share in high.values())
        if room < k:
            raise ConfigError(
                f"selection.floors.maximum: leaves room for {room} of {k} sequences, each share rounded down; raise a "
                "share"
            )


def check_strategy(selection: Any, k: int) -> None:
    """`selection`: a config.SelectionConfig, `k`: training.global_batch_size. Raises ConfigError."""
    s, weight = selection, selection.filter_then_weight
    for problem in _ado_problems(s.ado):
        raise ConfigError(f"selection.ado.{problem}")
    check_floors(s.floors, k)
    if weight.max_sweeps < 1 or weight.tolerance <= 0:
        raise ConfigError(
            "selection.filter_then_weight: expected max_sweeps >= 1 and tolerance > 0, got "
            f"{weight.max_sweeps} and {weight.tolerance}"
        )
    if s.strategy == "greats" and s.preconditioner.kind not in ("auto", "sgd"):
        raise ConfigError(
            f"selection.preconditioner.kind: greats scores in SGD's geometry (auto or sgd), got "
            f"{s.preconditioner.kind}; for another geometry use strategy opus with sampling greedy"
        )
    if s.strategy == "filter_then_weight" and s.redundancy.scale == "off":
        raise ConfigError(
            "selection.redundancy.scale: filter_then_weight needs the interaction matrix, which `off` leaves out; set "
            "matched (the scale itself is not used)"
        )
    if s.strategy in PERPLEXITY and (s.score_window != "first" or s.score_windows != 1):
        raise ConfigError(
            f"selection.score_windows: {s.strategy} scores the first window only, got score_window "
            f"{s.score_window} and score_windows {s.score_windows}"
        )


def _ado_problems(ado: AdoConfig) -> Iterator[str]:
    for name in ("refit_every", "block_steps", "first_fit"):
        if getattr(ado, name) < 1:
            yield f"{name}: expected a positive number of steps, got {getattr(ado, name)}"
    if not 0 <= ado.skip_steps < ado.first_fit:
        yield f"skip_steps: expected 0 <= skip_steps < first_fit ({ado.first_fit}), got {ado.skip_steps}"
    for name in ("preference", "credit"):
        if not 0 < getattr(ado, name) <= 1:
            yield f"{name}: expected 0 < share <= 1, got {getattr(ado, name)}"
    if ado.credit_power < 0:
        yield f"credit_power: expected >= 0, got {ado.credit_power}"
    if not 0 <= ado.min_share < 1:
        yield f"min_share: expected 0 <= share < 1, got {ado.min_share}"
