"""Scoring only while it pays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_opus.config import ControllerConfig, DomainBanditConfig, SelectionConfig
from megatron_opus.selection.strategies import build_strategy
from megatron_opus.types import Candidates, Signals

SETTINGS = {"enabled": True, "window": 3, "probe_first": 2, "probe_most": 8, "cost": 0.5}


def controlled(strategy="opus", bandit=0, **settings):
    config = SelectionConfig(
        strategy=strategy,
        sampling="greedy",
        controller=ControllerConfig(**{**SETTINGS, **settings}),
        domain_bandit=DomainBanditConfig(enabled=bandit > 0, move_every=max(1, bandit)),
    )
    return build_strategy(config, ("only",), np.ones(1))


def step(strategy, number, useful, signals=None, n=8):
    """Utilities of mean 1 and a spread of `useful`, whose best half is drawn: it has a mean of about 1 + 0.8 useful."""
    candidates = Candidates(step=number, sample_ids=np.arange(n), domains=np.zeros(n, dtype=np.int32))
    align = 1 + useful * torch.linspace(-1.5, 1.5, n, dtype=torch.float64)
    scored = strategy.scores_at(number) if signals is None else signals
    found = Signals(alignment=align, interaction=1e-9 * torch.eye(n).double()) if scored else Signals()
    selection = strategy.select(candidates, found, 4, torch.Generator().manual_seed(number))
    return scored, selection


def scored_steps(strategy, useful, steps):
    return [i for i in steps if step(strategy, i, useful)[0]]


def test_scoring_stops_when_it_does_not_pay_and_probes_ever_less():
    """Guards against a suspension before the window is full, a probe at every step, and intervals without a bound.

    A gain of 1.08 does not pay a cost of 0.5. Suspended after steps 0 to 2; probes after 2, 4, 8 and again 8 steps."""
    made = controlled()
    assert scored_steps(made, 0.1, range(30)) == [0, 1, 2, 4, 8, 16, 24]
    (line,) = made.notices()
    assert "step 2: scoring is suspended: over 3 scored steps" in line
    assert "the next probe is at step 4" in line


def test_it_goes_on_while_it_pays_and_comes_back_when_a_probe_does():
    """Guards against a controller that never returns, and one that judges a return by what was seen before it."""
    made = controlled()
    assert scored_steps(made, 2.0, range(10)) == [*range(10)]
    assert scored_steps(made, 0.1, range(10, 20)) == [10, 11, 12, 14, 18]
    made.notices()
    assert scored_steps(made, 2.0, range(20, 36)) == [*range(26, 36)]
    assert any("step 26: scoring is resumed" in line for line in made.notices())


@pytest.mark.parametrize(("cost", "pays"), [(0.0, True), (0.7, True), (0.9, False)])
def test_the_gain_is_held_against_the_seconds(cost, pays):
    """Guards against a comparison of something else than mean U(drawn) with (1 + cost) mean U(all).

    The upper half of the eight utilities 1 - 1.5 ... 1 + 1.5 has the mean 1 + 6/7 = 1.857."""
    assert len(scored_steps(controlled(cost=cost), 1.0, range(9))) == (9 if pays else 5)


def test_a_negative_mean_pays_only_with_less_harm():
    """Guards against a ratio of means, whose sign turns where the buffer as a whole harms the target."""
    made = controlled(cost=0.5)
    for number in range(3):
        c = Candidates(step=number, sample_ids=np.arange(8), domains=np.zeros(8, dtype=np.int32))
        align = -1 + 0.1 * torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)
        made.select(c, Signals(alignment=align, interaction=torch.eye(8).double()), 4, torch.Generator().manual_seed(0))
    assert made.scores_at(3)


def test_seconds_are_measured_where_no_cost_is_given():
    """Guards against a first step that takes a minute and decides the whole run; the median counts."""
    made = controlled(cost=None)
    assert made.wants_seconds
    assert not controlled().wants_seconds
    for number in range(4):
        assert step(made, number, 0.1)[0]  # nothing is known about the cost: go on
    for seconds in ((60.0, 1.0), (0.1, 1.0), (0.01, 1.0)):
        made.observe_seconds(*seconds)
    scored, selection = step(made, 4, 0.3)
    assert scored
    assert selection.diagnostics["controller_cost"] == pytest.approx(0.1)
    assert made.scores_at(5)


def test_unscored_steps_are_uniform_and_are_no_fallbacks():
    """Guards against suspended steps that count toward max_fallbacks, and against a draw without the generator."""
    made = controlled()
    for number in range(3):
        step(made, number, 0.1)
    scored, selection = step(made, 3, 0.1)
    plain = build_strategy(SelectionConfig(strategy="random"), ("only",))
    assert not scored
    assert selection.fallback == ""
    assert selection.indices.tolist() == step(plain, 3, 0.1, signals=False)[1].indices.tolist()
    assert selection.diagnostics["controller_scoring"] == 0


def test_a_probe_that_says_nothing_is_not_made_again_at_once():
    """Guards against a run whose probes fall back, as with equal utilities: it would score every step in suspension."""
    made = controlled()
    for number in range(3):
        step(made, number, 0.1)
    assert [number for number in range(3, 12) if step(made, number, 0.0)[0]] == [4, 8]


def test_a_step_scored_for_the_bandit_is_a_probe_that_costs_nothing():
    """Guards against a bandit that stands still while scoring is suspended, and an interval that its steps double."""
    made = controlled(bandit=5)
    assert scored_steps(made, 0.1, range(16)) == [0, 1, 2, 4, 5, 8, 10, 15]


def test_its_state_is_what_a_resumed_run_needs():
    """Guards against a window, an interval or the next probe missing from the checkpoint."""
    for cut_at in (2, 3, 5, 9):
        whole, cut, resumed = controlled(), controlled(), controlled()
        for number in range(cut_at):
            step(whole, number, 0.1)
            step(cut, number, 0.1)
        resumed.load_state_dict(cut.state_dict())
        assert scored_steps(whole, 0.1, range(cut_at, 20)) == scored_steps(resumed, 0.1, range(cut_at, 20))
