"""Score only while it pays: what the choice gains against the seconds that it takes.

Let U be the utilities of the buffer, first-order gains of the target by training on each candidate. Training on what
was drawn gains mean U(drawn) per place, a uniform draw mean U(all). With `cost` = seconds of choosing / seconds of the
update, the gain per second of a scored step is mean U(drawn) / (1 + cost), that of an unscored one mean U(all). So

    scoring pays  if and only if  mean U(drawn) > (1 + cost) * mean U(all)

Example: where the drawn half has 1.3 times the buffer's mean utility, scoring pays as long as it adds less than 30% to
a step. Both means are averaged over a window of scored steps, in the utilities' own unit, so that a step counts as much
as it gains.

    scoring     every step is scored. A full window that does not pay: suspended
    suspended   steps are drawn uniformly from the buffer. A probe is scored after probe_first steps, and chosen by; one
                that pays ends the suspension, one that does not doubles the steps to the next one, to probe_most

The proxy that ranks the candidates also values those that were drawn. Its noise is in both, so the gain is estimated
too high, most where the candidates hardly differ.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megatron_opus.config import ControllerConfig
from megatron_opus.selection.limits import Floors
from megatron_opus.selection.strategies.base import Around, draw_uniformly
from megatron_opus.types import Candidates, Selection, SelectionStrategy, Signals


class Controller(Around):
    """`inner` chooses at scored steps. With a `cost` in the settings every decision follows from the signals alone."""

    def __init__(self, inner: SelectionStrategy, config: ControllerConfig, floors: Floors | None = None) -> None:
        super().__init__(inner)
        self._config, self._floors = config, floors
        self.wants_seconds = inner.wants_seconds or config.cost is None
        self._scoring = True
        self._interval, self._next_probe = config.probe_first, 0
        self._seen: deque[tuple[float, float]] = deque(maxlen=config.window)  # mean U(drawn), mean U(all)
        self._costs: deque[float] = deque(maxlen=config.window)
        self._notices: list[str] = []

    def scores_at(self, step: int) -> bool:
        return self._inner.scores_at(step) and (self._scoring or step >= self._next_probe)

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection:
        if signals.alignment is None:
            return draw_uniformly(
                candidates, k, generator, self._floors, diagnostics={"controller_scoring": 0.0, **self._cost_said()}
            )
        selection = self._inner.select(candidates, signals, k, generator)
        gains = None if selection.fallback else _gains(signals, selection)
        said = {"controller_scoring": float(self._scoring), **self._cost_said()}
        if gains is None:
            self._put_off(candidates.step)
        else:
            self._seen.append(gains)
            self._decide(candidates.step, gains)
            said |= {"controller_drawn": gains[0], "controller_all": gains[1]}
        return dataclasses.replace(selection, diagnostics={**selection.diagnostics, **said})

    def observe_seconds(self, choosing: float, updating: float) -> None:
        super().observe_seconds(choosing, updating)
        if updating > 0:
            self._costs.append(choosing / updating)

    def notices(self) -> list[str]:
        said, self._notices = self._notices, []
        return [*super().notices(), *said]

    def state_dict(self) -> dict[str, Any]:
        return {
            "inner": self._inner.state_dict(),
            "scoring": self._scoring,
            "interval": self._interval,
            "next_probe": self._next_probe,
            "seen": [list(pair) for pair in self._seen],
            "costs": list(self._costs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._inner.load_state_dict(state["inner"])
        self._scoring, self._interval = bool(state["scoring"]), int(state["interval"])
        self._next_probe = int(state["next_probe"])
        self._seen = deque(((a, b) for a, b in state["seen"]), maxlen=self._config.window)
        self._costs = deque(state["costs"], maxlen=self._config.window)

    @property
    def _cost(self) -> float | None:
        """Seconds of choosing over seconds of the update; None: not measured yet."""
        if self._config.cost is not None:
            return self._config.cost
        return statistics.median(self._costs) if self._costs else None

    def _cost_said(self) -> dict[str, float]:
        return {} if self._cost is None else {"controller_cost": self._cost}

    def _decide(self, step: int, gains: tuple[float, float]) -> None:
        """Suspend, probe later, or go on, after one more scored step."""
        c, cost = self._config, self._cost
        if cost is None or (self._scoring and len(self._seen) < c.window):
            return
        if self._scoring:
            drawn, everyone = np.mean(self._seen, axis=0).tolist()
            if drawn > (1 + cost) * everyone:
                return
            self._scoring, self._interval = False, c.probe_first
            self._next_probe = step + self._interval
            self._notices.append(
                f"step {step}: scoring is suspended: over {c.window} scored steps the drawn had a mean utility of "
                f"{drawn:.3g}, the buffer {everyone:.3g}, and choosing takes {cost:.2f} of an update's seconds; the "
                f"next probe is at step {self._next_probe}"
            )
        elif gains[0] > (1 + cost) * gains[1]:
            self._scoring = True
            self._seen.clear()
            self._notices.append(
                f"step {step}: scoring is resumed: in a probe the drawn had a mean utility of {gains[0]:.3g}, the "
                f"buffer {gains[1]:.3g}, and choosing takes {cost:.2f} of an update's seconds"
            )
        else:
            self._put_off(step)

    def _put_off(self, step: int) -> None:
        """Double the way to the next probe after one that did not pay, or that said nothing."""
        if not self._scoring and step >= self._next_probe:
            self._interval = min(2 * self._interval, self._config.probe_most)
            self._next_probe = step + self._interval


def _gains(signals: Signals, selection: Selection) -> tuple[float, float] | None:
    """(mean utility of the drawn, weighted as they are trained on; of the buffer); None where there is no spread."""
    assert signals.alignment is not None
    utility = signals.alignment.numpy()
    usable = np.isfinite(utility)
    if signals.finite is not None:
        usable &= signals.finite.numpy()
    if usable.sum() < 2 or utility[usable].std() == 0:
        return None
    drawn = utility[selection.indices.numpy()]
    weights = None if selection.weights is None else selection.weights.double().numpy()
    return float(np.average(drawn, weights=weights)), float(utility[usable].mean())
