"""Settings of domain weights that change during a run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_opus.config.schema import Matches, Section, at_least, require

Place = Annotated[str, Matches(r"step (0|[1-9][0-9]{0,8})|(100|[1-9]?[0-9](\.[0-9]{1,6})?)%", "`step N` or `P%`")]
Weight = Annotated[float, at_least(0, 10**15)]
Points = Sequence[tuple[int, Mapping[str, float]]]  # first step, weights; ascending


@dataclass(frozen=True, kw_only=True)
class DomainScheduleConfig(Section, at="data.domain_schedule"):
    """Weights of the candidate domains over the run, in the place of `data.domain_weights`."""

    # Where weights stand (`step 1000`, or `80%` of training.train_steps) to the domains' weights from there on, in any
    # unit. The first one stands at `0%`; after the last one nothing changes. Empty: no schedule.
    points: dict[Place, dict[str, Weight]] = field(default_factory=dict, hash=False)
    # Between two points: the weights of the earlier one, or a straight line from the one to the other.
    interpolation: Literal["constant", "linear"] = "constant"

    def check_together(self) -> None:
        for place, weights in self.points.items():
            require(
                sum(weights.values()) > 0,
                f"data.domain_schedule.points.{place}: expected non-negative numbers with a positive sum, got "
                f"{weights}",
            )

    def resolved(self, train_steps: int) -> Points:
        """Return the first step of every point with its weights, in order: `80%` of 1,000 steps is step 800.

        Raises ConfigError where the first point is not at step 0, or where two points are at one step.
        """
        points = sorted(
            ((_step(place, train_steps), w) for place, w in self.points.items()), key=lambda point: point[0]
        )
        steps = [step for step, _ in points]
        require(
            not points or steps[0] == 0,
            f"data.domain_schedule.points: expected a first point at `0%` or `step 0`, got {list(self.points)}",
        )
        twice = [a for a, b in itertools.pairwise(steps) if a == b]
        require(
            not twice,
            f"data.domain_schedule.points: two points stand at step {twice[:1]} of {train_steps}; leave one out, got "
            f"{list(self.points)}",
        )
        return points


def _step(place: str, train_steps: int) -> int:
    if place.endswith("%"):
        return round(float(place[:-1]) / 100 * train_steps)
    return int(place.removeprefix("step "))
