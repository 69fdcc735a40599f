"""Score only while it pays: what the choice gains against the seconds that it takes.

Let U be the utilities of the buffer, first-order gains of the target by training on each candidate. Training on what
was drawn gains `drawn` per place, and a uniform draw from the configured mixture gains `all`. With `cost` = seconds of
choosing / seconds of the update, and a share `often` of the steps that is scored,

    scoring pays  if and only if  drawn - all > often * cost * |all|

Example: where the drawn half has 1.3 times the buffer's mean utility, scoring pays as long as it adds less than 30% to
a step.

The mean utility of the drawn candidates says too much. They were chosen by the same proxy batch, so its noise speaks
for them. Therefore the pass also measures the candidates against each half of the batch, U_1 and U_2. The noise of the
halves is independent, so cov(U_1, U_2) is the variance of the true utilities, and

    r     = cov(U_1, U_2) / var U         the share of what is seen that a fresh proxy would see again
    drawn = mean U + r (mean U(drawn) - mean U)

which is what a linear regression expects of a fresh proxy. Example: half of the variance is noise, the buffer has the
mean 1 and the drawn have 1.8; a fresh proxy would give them 1.4.

Where the bandit moves the mixture, mean U is that of its shares, and `all` is that of the configured ones, both from
the mean utilities of the domains in the same buffer. A domain that the buffer does not hold, since the bandit hardly
asks for it, is taken for as good as the worst that it holds. The shares follow from earlier proxy batches, so that
their gain needs no correction.

Where a prefilter picks, `all` and the domains' means are those of the candidates that it took unseen, and `drawn` has
the lead of the picked ones as well: they, too, follow from earlier proxy batches.

    lead   = mean U(picked) - mean U(unseen)
    drawn += often * (share of the buffer that is picked) * lead
    drawn += (1 - often) * max(0, lead)            with prefilter.every_step, which picks while it leads

All means run over a window of scored steps, probes included. Utilities are in units of their step's mean |U|: from step
to step they differ by a factor of ten and more, and one step would stand for the window.

    scoring     every step is scored that the strategy wants. A full window that does not pay: suspended
    suspended   steps are drawn uniformly, from the configured mixture, and no prefilter picks. A probe is scored after
                probe_first steps. One that does not pay by itself doubles the steps to the next one, to probe_most;
                after one that does, the next comes after probe_first steps again. When the window pays, the
                suspension ends
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_opus.config import ControllerConfig
from megatron_opus.selection.limits import Floors
from megatron_opus.selection.strategies.base import Around, draw_uniformly
from megatron_opus.types import Candidates, Selection, SelectionStrategy, Signals


class Seen(NamedTuple):
    """What one scored step says, in units of the mean |U| of its buffer."""

    step: int
    mixture: float  # mean utility of the buffer, or under the shares that the bandit asked for
    everyone: float  # the same under the configured shares
    excess: float  # of the drawn, over the mean of the buffer
    agreement: float  # r of this step
    lead: float = 0.0  # of what a prefilter picked, over what it took unseen
    picked: float = 0.0  # share of the buffer that it picked


class Controller(Around):
    """`inner` chooses at scored steps. With a `cost` in the settings every decision follows from the signals alone."""

    def __init__(
        self,
        inner: SelectionStrategy,
        config: ControllerConfig,
        floors: Floors | None = None,
        prior: np.ndarray | None = None,
        picks_between: bool = False,
    ) -> None:
        """prior [D]: the configured domain weights, where the scores move the buffer's mixture; None: they do not.

        picks_between: a prefilter picks at unscored steps as well.
        """
        super().__init__(inner)
        self._config, self._floors, self._prior, self._picks_between = config, floors, prior, picks_between
        self.wants_seconds = inner.wants_seconds or config.cost is None
        self._scoring = True
        self._often = 1.0  # share of the steps that are scored while scoring is not suspended
        self._interval, self._next_probe = config.probe_first, 0
        self._seen: deque[Seen] = deque(maxlen=config.window)
        self._costs: deque[float] = deque(maxlen=config.window)
        self._notices: list[str] = []

    def domain_weights(self, step: int) -> Tensor | None:
        moved = self._prior is not None and not self._scoring
        return None if moved else self._inner.domain_weights(step)

    def scores_at(self, step: int) -> bool:
        return self._inner.scores_at(step) and (self._scoring or step >= self._next_probe)

    def picks_at(self, step: int) -> bool:
        return self._scoring and self._inner.picks_at(step)

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection:
        said = {"controller_scoring": float(self._scoring), **self._cost_said()}
        if signals.alignment is None and not self._scoring:
            return draw_uniformly(candidates, k, generator, self._floors, diagnostics=said)
        shares = None if self._prior is None else self._inner.domain_weights(candidates.step)
        selection = self._inner.select(candidates, signals, k, generator)
        if signals.alignment is not None:
            seen = None if selection.fallback else _seen(candidates, signals, selection, shares, self._prior)
            if seen is None:
                self._put_off(candidates.step)
            else:
                self._seen.append(seen)
                gains = self._gains(self._seen)
                said |= {
                    "controller_drawn": gains[0],
                    "controller_all": gains[1],
                    "controller_agreement": self._agreement,
                }
                self._decide(candidates.step, gains)
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
            "often": self._often,
            "interval": self._interval,
            "next_probe": self._next_probe,
            "window": [list(one) for one in self._seen],
            "costs": list(self._costs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._inner.load_state_dict(state["inner"])
        self._scoring, self._interval = bool(state["scoring"]), int(state["interval"])
        self._next_probe = int(state["next_probe"])
        # of an earlier release there is a "seen" instead, without the halves: the window is filled anew
        self._seen = deque((Seen(*one) for one in state.get("window", ())), maxlen=self._config.window)
        self._often = state.get("often", 1.0)
        self._costs = deque(state["costs"], maxlen=self._config.window)

    @property
    def _cost(self) -> float | None:
        """Seconds of choosing over seconds of the update; None: not measured yet."""
        if self._config.cost is not None:
            return self._config.cost
        return statistics.median(self._costs) if self._costs else None

    def _cost_said(self) -> dict[str, float]:
        return {} if self._cost is None else {"controller_cost": self._cost}

    @property
    def _agreement(self) -> float:
        """Return r of the module's text: its mean over the window, within 0 and 1."""
        return min(1.0, max(0.0, float(np.mean([one.agreement for one in self._seen]))))

    def _gains(self, rows: Sequence[Seen]) -> tuple[float, float]:
        """Return (drawn, all) of the module's text over some scored steps."""
        mixture, everyone, excess = (float(np.mean([row[i] for row in rows])) for i in (1, 2, 3))
        lead, picked = (float(np.mean([row[i] for row in rows])) for i in (5, 6))
        led = self._often * picked * lead
        if self._picks_between:
            led += (1 - self._often) * max(0.0, lead)
        return mixture + self._agreement * excess + led, everyone

    def _decide(self, step: int, gains: tuple[float, float]) -> None:
        """Suspend, go on, resume, or say when the next probe comes, after one more scored step."""
        c, cost, seen = self._config, self._cost, self._seen
        if cost is None or len(seen) < c.window:
            return
        if self._scoring and len(seen) > 1:
            self._often = (len(seen) - 1) / (seen[-1].step - seen[0].step)
        added = self._often * cost

        def pays(drawn: float, everyone: float) -> bool:
            return drawn - everyone > added * abs(everyone)

        numbers = (
            f"over {c.window} scored steps the drawn had a mean utility of {gains[0]:.2f} and a uniform draw of "
            f"{gains[1]:.2f} (mean |utility| is 1), and choosing adds {added:.2f} of an update's seconds to a step"
        )
        if self._scoring and not pays(*gains):
            self._scoring, self._interval = False, c.probe_first
            self._next_probe = step + self._interval
            self._notices.append(
                f"step {step}: scoring is suspended: {numbers}; the next probe is at step {self._next_probe}"
            )
        elif not self._scoring and pays(*gains):
            self._scoring = True
            self._notices.append(f"step {step}: scoring is resumed: {numbers}")
        elif not self._scoring and pays(*self._gains([seen[-1]])):
            self._interval = c.probe_first
            self._next_probe = step + self._interval
        else:
            self._put_off(step)

    def _put_off(self, step: int) -> None:
        """Double the way to the next probe after one that did not pay, or that said nothing."""
        if not self._scoring and step >= self._next_probe:
            self._interval = min(2 * self._interval, self._config.probe_most)
            self._next_probe = step + self._interval


def _seen(
    candidates: Candidates, signals: Signals, selection: Selection, shares: Tensor | None, prior: np.ndarray | None
) -> Seen | None:
    """Return what one scored step says; None where its utilities have no spread.

    `shares` [D] are those that the bandit asked for, `prior` [D] the configured ones.
    """
    if signals.alignment is None or signals.halves is None:
        raise ValueError(
            "controller: expected the alignment with each half of the proxy, got none; build the scoring "
            "pass with selection.controller.enabled"
        )
    utility, halves = signals.alignment.numpy(), signals.halves.numpy()
    usable = np.isfinite(utility) & np.isfinite(halves).all(1)
    if signals.finite is not None:
        usable &= signals.finite.numpy()
    if usable.sum() < 2 or utility[usable].std() == 0:
        return None
    agreement = float(np.cov(halves[usable].T)[0, 1] / utility[usable].var(ddof=1))
    utility = utility / np.abs(utility[usable]).mean()
    weights = None if selection.weights is None else selection.weights.double().numpy()
    excess = float(np.average(utility[selection.indices.numpy()], weights=weights) - utility[usable].mean())
    unseen, lead, share = usable, 0.0, 0.0
    if candidates.unseen:
        first = np.arange(len(utility)) < candidates.unseen
        unseen, picked = usable & first, usable & ~first
        if not unseen.any():
            return None
        if picked.any():
            lead, share = float(utility[picked].mean() - utility[unseen].mean()), float(picked.sum() / usable.sum())
    mean = float(utility[unseen].mean())
    if shares is None or prior is None:
        return Seen(candidates.step, mean, mean, excess, agreement, lead, share)
    domains = candidates.domains[unseen]
    count = np.bincount(domains, minlength=len(prior))
    total = np.bincount(domains, weights=utility[unseen], minlength=len(prior))
    present = count > 0
    values = np.full(len(prior), (total[present] / count[present]).min())
    values[present] = total[present] / count[present]
    mixture, everyone = (float(np.average(values, weights=weights)) for weights in (shares.numpy(), prior))
    return Seen(candidates.step, mixture, everyone, excess, agreement, lead, share)
