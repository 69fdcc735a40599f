"""Settings of the strategies, and which domain floors K sequences can keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_opus.config.schema import Section, above, at_least, positive, require, within

Strategy = Literal["opus", "random", "high_ppl", "middle_ppl", "low_ppl", "greats", "ado", "filter_then_weight"]
PERPLEXITY: tuple[Strategy, ...] = ("high_ppl", "middle_ppl", "low_ppl")
GHOST: tuple[Strategy, ...] = ("opus", "greats", "filter_then_weight")  # score with gradients
ROUNDING = 1e-9  # 0.3 of 10 sequences are 3

Steps = Annotated[int, positive(10**9)]
Sequences = Annotated[int, positive(10**6)]
Part = Annotated[float, within("0 < share <= 1")]
Share = Annotated[float, within("0 <= share <= 1")]


@dataclass(frozen=True, kw_only=True)
class RedundancyConfig(Section, at="selection.redundancy"):
    """The term that lowers the utility of candidates like those drawn already."""

    # How the term is weighed: to match the spread of the alignment, by the learning rate (paper), or not at all.
    scale: Literal["matched", "paper", "off"] = "matched"
    # matched: mean |redundancy| of a half-filled batch over the standard deviation of the alignment.
    fraction: Annotated[float, at_least(0, 10**6)] = 0.1


@dataclass(frozen=True, kw_only=True)
class AdoConfig(Section, at="selection.ado"):
    """Domain shares of the buffer from online scaling laws (arXiv 2410.11820). Steps are optimizer steps."""

    # ADO fills the buffer in which any strategy selects; strategy `ado` is random with ADO.
    enabled: bool = False
    skip_steps: Annotated[int, at_least(0, 10**9)] = 500  # First steps whose losses are left out of every fit.
    first_fit: Steps = 1000  # Step of the first fit; until then the configured domain weights hold.
    refit_every: Steps = 1000  # Steps between fits.
    block_steps: Steps = 10  # Losses of so many steps are averaged to one point of the curve.
    # Lower bound of the irreducible loss, in log nats.
    min_log_epsilon: Annotated[float, within("-100 <= log_epsilon <= 100")] = 0.5
    preference: Part = 0.1  # Share of the newest preference in the policy; the rest is its running mean.
    credit: Part = 0.1  # Weight of the newest policy in the history h.
    credit_power: Annotated[float, at_least(0, 100)] = 0.5  # The preference is proportional to h to this power.
    # No domain with a weight gets less than this share.
    min_share: Annotated[float, within("0 <= share < 1")] = 0.01

    def check_together(self) -> None:
        require(
            self.skip_steps < self.first_fit,
            f"selection.ado.skip_steps: expected 0 <= skip_steps < first_fit ({self.first_fit}), got {self.skip_steps}",
        )


@dataclass(frozen=True, kw_only=True)
class FilterThenWeightConfig(Section, at="selection.filter_then_weight"):
    """Non-negative least squares on the K kept sequences."""

    max_sweeps: Steps = 1000  # Most sweeps of coordinate descent per step.
    # It stops when no weight changes by more in a sweep, relative to the largest weight.
    tolerance: Annotated[float, within("0 < tolerance <= 1")] = 1e-10


@dataclass(frozen=True, kw_only=True)
class DomainBanditConfig(Section, at="selection.domain_bandit"):
    """Domain shares of the buffer that follow the utilities of each domain's candidates."""

    enabled: bool = False  # Fills the buffer in which the strategy selects; with strategy random it is all that scores.
    # Steps between two moves. With strategy random the steps between are not scored.
    move_every: Steps = 8
    # What a domain whose candidates are one standard deviation above the buffer's mean adds to the log of its weight.
    step_size: Annotated[float, above(0, 100)] = 0.3
    # Share of the old log weight that is kept at a move: below 1, old moves are forgotten; 1: nothing is.
    memory: Annotated[float, within("0 <= memory <= 1")] = 0.95
    # No domain with a weight gets less than this share.
    min_share: Annotated[float, within("0 <= share < 1")] = 0.02


@dataclass(frozen=True, kw_only=True)
class ControllerConfig(Section, at="selection.controller"):
    """Scores only while it pays. A step that is not scored is drawn uniformly from the same buffer."""

    enabled: bool = False  # Score only while the utility that is gained is worth the seconds that it takes.
    window: Steps = 8  # Scored steps whose means are compared before scoring is suspended.
    probe_first: Steps = 4  # Steps from the suspension to the first probe. Each probe that does not pay doubles them.
    probe_most: Steps = 64  # Most steps between two probes.
    # Seconds of choosing over seconds of the update. null: measured. A number makes a run repeatable to the bit.
    cost: Annotated[float, at_least(0, 1000)] | None = None


@dataclass(frozen=True, kw_only=True)
class PrefilterConfig(Section, at="selection.prefilter"):
    """Candidates picked from a larger pool by what a linear model expects of their text, before any is scored."""

    pool_ratio: Annotated[int, positive(64)] = 1  # The pool is so many times the buffer. 1: no prefilter.
    # Share of a scored buffer that is taken from the pool unseen, so that the model keeps learning and can be checked.
    unfiltered: Annotated[float, within("0 < share <= 1")] = 0.25
    # Pick at steps that are not scored, too, while what was picked has lately been better than what was not.
    # false: those steps take what a uniform draw from the pool gives.
    every_step: bool = False
    columns: Annotated[int, positive(2**24)] = 65536  # Hashed n-grams that the model tells apart; a power of two.
    learning_rate: Annotated[float, above(0, 100)] = 1.0  # Share of a Newton step that each fit takes.
    forgetting: Annotated[float, within("0 <= share < 1")] = 0.01  # Share of what was learnt that each fit forgets.

    def check_together(self) -> None:
        require(
            self.columns & (self.columns - 1) == 0,
            f"selection.prefilter.columns: expected a power of two, got {self.columns}",
        )


@dataclass(frozen=True, kw_only=True)
class FloorsConfig(Section, at="selection.floors"):
    """Shares of the K selected sequences that domains are sure of, and that they never exceed."""

    # hash=False: settings are kept in sets and caches, which a dict would refuse

    # Candidate domain to the share of the selected sequences that it is sure of, rounded up.
    minimum: dict[str, Share] = field(default_factory=dict, hash=False)
    # Candidate domain to the share of the selected sequences that it never exceeds, rounded down.
    maximum: dict[str, Share] = field(default_factory=dict, hash=False)


def least(share: float, k: int) -> int:
    return math.ceil(share * k - ROUNDING)


def most(share: float, k: int) -> int:
    return math.floor(share * k + ROUNDING)


def check_floors(floors: FloorsConfig, k: int, domains: tuple[str, ...] | None = None) -> None:
    """Raise ConfigError for bounds that no selection of k can satisfy; with `domains` also for unknown names."""
    low, high = floors.minimum, floors.maximum
    for key, shares in (("minimum", low), ("maximum", high)):
        for name in shares:
            require(
                domains is None or name in domains,
                f"selection.floors.{key}: no candidate domain {name!r}; there are {list(domains or ())}",
            )
    for name in sorted({*low} & {*high}):
        require(
            least(low[name], k) <= most(high[name], k),
            f"selection.floors: {name} is to have at least {least(low[name], k)} and at most {most(high[name], k)} of "
            f"{k} sequences ({low[name]:g} rounded up, {high[name]:g} rounded down)",
        )
    owed = sum(least(share, k) for share in low.values())
    require(
        owed <= k,
        f"selection.floors.minimum: asks for {owed} of {k} sequences, each share rounded up; lower a share or raise "
        "training.global_batch_size",
    )
    room = sum(most(share, k) for share in high.values())
    require(
        domains is None or room >= k or any(name not in high for name in domains),
        f"selection.floors.maximum: leaves room for {room} of {k} sequences, each share rounded down; raise a share",
    )
