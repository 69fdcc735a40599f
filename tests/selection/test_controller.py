"""Scoring only while it pays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_opus.config import ConfigError, ControllerConfig, DomainBanditConfig, PrefilterConfig, SelectionConfig
from megatron_opus.config.load import from_dict
from megatron_opus.selection.strategies import build_strategy
from megatron_opus.types import Candidates, Signals

SETTINGS = {"enabled": True, "window": 3, "probe_first": 2, "probe_most": 8, "cost": 0.5}
PRIOR = np.array([0.2, 0.4, 0.4])
SMALL = {"name": "x", "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}}


def controlled(strategy="opus", **settings):
    config = SelectionConfig(
        strategy=strategy,
        sampling="greedy",
        controller=ControllerConfig(**{**SETTINGS, **settings}),
    )
    return build_strategy(config, ("only",), np.ones(1))


def step(strategy, number, useful, signals=None, n=8):
    """Utilities of mean 1 and a spread of `useful`, whose best half is drawn: it has a mean of about 1 + 0.8 useful."""
    candidates = Candidates(step=number, sample_ids=np.arange(n), domains=np.zeros(n, dtype=np.int32))
    align = 1 + useful * torch.linspace(-1.5, 1.5, n, dtype=torch.float64)
    scored = strategy.scores_at(number) if signals is None else signals
    both = torch.stack([align, align], 1)  # without any noise, the halves of the proxy say the same
    found = Signals(alignment=align, halves=both, interaction=1e-9 * torch.eye(n).double()) if scored else Signals()
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


def test_it_goes_on_while_it_pays_and_comes_back_when_the_window_does():
    """Guards against a controller that never returns, and one that a single probe brings back.

    The probe at step 25 would pay, the window of steps 13, 17 and 25 does not. So the next one comes soon, at 27."""
    made = controlled()
    assert scored_steps(made, 2.0, range(10)) == [*range(10)]
    assert scored_steps(made, 0.1, range(10, 20)) == [10, 11, 13, 17]
    made.notices()
    assert scored_steps(made, 2.0, range(20, 36)) == [25, *range(27, 36)]
    assert any("step 27: scoring is resumed" in line for line in made.notices())


@pytest.mark.parametrize(("cost", "pays"), [(0.0, True), (0.7, True), (0.9, False)])
def test_the_gain_is_held_against_the_seconds(cost, pays):
    """Guards against a comparison of something else than mean U(drawn) with (1 + cost) mean U(all).

    The upper half of the eight utilities 1 - 1.5 ... 1 + 1.5 has the mean 1 + 6/7 = 1.857."""
    assert len(scored_steps(controlled(cost=cost), 1.0, range(9))) == (9 if pays else 5)


@pytest.mark.parametrize(("useful", "pays"), [(0.0, False), (0.3, False), (1.0, True)])
def test_where_a_uniform_draw_harms(useful, pays):
    """Guards against a ratio of means, whose sign turns, and against scoring for its own sake: a slower step harms less
    per second, whatever is drawn.

    The utilities have the mean -1, and the drawn half lies 0.86 useful above it. The cost is 0.5."""
    made = controlled()
    for number in range(3):
        c = Candidates(step=number, sample_ids=np.arange(8), domains=np.zeros(8, dtype=np.int32))
        align = -1 + (useful + 1e-6) * torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)
        both = torch.stack([align, align], 1)
        found = Signals(alignment=align, halves=both, interaction=1e-9 * torch.eye(8).double())
        made.select(c, found, 4, torch.Generator().manual_seed(0))
    assert made.scores_at(3) == pays


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


def noisy_step(strategy, number, noise, n=512):
    """True utilities of mean 1 and spread 0.5; each half of the proxy adds noise of its own to what it says of them."""
    generator = torch.Generator().manual_seed(1000 + number)
    true = 1 + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    both = true[:, None] + noise * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    found = Signals(alignment=both.mean(1), halves=both, interaction=1e-9 * torch.eye(n).double())
    candidates = Candidates(step=number, sample_ids=np.arange(n), domains=np.zeros(n, dtype=np.int32))
    selection = strategy.select(candidates, found, n // 2, generator)
    drawn, unit = selection.indices, both.mean(1).abs().mean()
    return selection.diagnostics, *((x[drawn].mean() / unit).item() for x in (true, both.mean(1)))


@pytest.mark.parametrize("noise", [0.0, 0.7, 2.0])
def test_the_gain_is_that_of_a_fresh_proxy(noise):
    """Guards against a proxy whose noise chooses the candidates and then values them: every choice looked good.

    With noise 2 in each half the utilities have a spread of 1.5, of which 0.5 is true."""
    made = controlled(window=40, cost=0.0)
    rows = [noisy_step(made, number, noise) for number in range(40)]
    true, seen = (float(np.mean([row[i] for row in rows])) for i in (1, 2))
    assert rows[-1][0]["controller_drawn"] == pytest.approx(true, abs=0.05)
    assert rows[-1][0]["controller_agreement"] == pytest.approx(0.25 / (0.25 + noise**2 / 2), abs=0.08)
    assert noise == 0 or seen > true + 0.1


def mixed_step(strategy, number, values, n=32):
    """A buffer filled as asked for, whose candidates have the utilities of their domains; whether it was scored."""
    shares = strategy.domain_weights(number)
    shares = PRIOR if shares is None else shares.numpy()
    ends = np.round(np.cumsum(shares) * n).astype(int)
    domains = np.searchsorted(ends, np.arange(n), side="right").astype(np.int32)
    noise = 0.1 * torch.randn(n, 2, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    both = torch.tensor(values, dtype=torch.float64)[torch.from_numpy(domains).long()][:, None] + noise
    scored = strategy.scores_at(number)
    found = Signals(alignment=both.mean(1), halves=both) if scored else Signals()
    candidates = Candidates(step=number, sample_ids=np.arange(n), domains=domains)
    strategy.select(candidates, found, 8, torch.Generator().manual_seed(number))
    return scored


def mixing(cost):
    config = SelectionConfig(
        strategy="random",
        controller=ControllerConfig(**{**SETTINGS, "window": 4, "cost": cost}),
        domain_bandit=DomainBanditConfig(enabled=True, move_every=2),
    )
    return build_strategy(config, ("a", "b", "c"), PRIOR)


def test_a_mixture_that_gains_nothing_is_given_up():
    """Guards against scoring that goes on for a bandit although no domain helps more, and against the mixture that its
    noise has found being kept after that."""
    made = mixing(cost=1.0)
    scored = [number for number in range(60) if mixed_step(made, number, (1.0, 1.0, 1.0))]
    assert scored == [0, 2, 4, 6, 8, 12, 20, 28, 36, 44, 52]
    assert made.domain_weights(60) is None
    assert "choosing adds 0.50 of an update's seconds to a step" in made.notices()[0]


def test_a_mixture_that_gains_is_kept_and_found_again():
    """Guards against a gain that is looked for in the draw alone, where the draw is uniform, and against a suspension
    that is never left because its own buffers are filled by the configured weights."""
    made = mixing(cost=1.0)
    assert [number for number in range(20) if mixed_step(made, number, (3.0, 1.0, 1.0))] == [*range(0, 20, 2)]
    assert made.domain_weights(20)[0] > 0.5
    for number in range(20, 60):
        mixed_step(made, number, (1.0, 1.0, 1.0))
    assert made.domain_weights(60) is None
    scored = [number for number in range(60, 100) if mixed_step(made, number, (3.0, 1.0, 1.0))]
    assert [*np.diff(scored)][-5:] == [2] * 5
    assert made.domain_weights(100)[0] > 0.4


def picked_step(strategy, number, unseen, picked, n=32):
    """A buffer whose first half a prefilter took unseen, with these mean utilities; what is said of it."""
    true = torch.cat([torch.full((n // 2,), unseen), torch.full((n // 2,), picked)]).double()
    both = true[:, None] + 0.01 * torch.randn(
        n, 2, generator=torch.Generator().manual_seed(number), dtype=torch.float64
    )
    scored = strategy.scores_at(number)
    found = Signals(alignment=both.mean(1), halves=both) if scored else Signals()
    candidates = Candidates(
        step=number,
        sample_ids=np.arange(n),
        domains=(np.arange(n) % 3).astype(np.int32),
        unseen=n // 2 if scored else 0,
    )
    return strategy.select(candidates, found, 8, torch.Generator().manual_seed(number)).diagnostics


@pytest.mark.parametrize(("picked", "every_step", "drawn"), [(1.6, True, 1.45), (1.6, False, 1.15), (0.4, True, 0.85)])
def test_what_a_prefilter_picks_is_held_against_what_it_takes_unseen(picked, every_step, drawn):
    """Guards against picks that count on both sides, which hides what they gain, and against picks between the scored
    steps that are counted although nothing picks there: every second step is scored, half of a scored buffer picked.

    A lead of 0.6 over the unseen is worth 0.6 / 2 at each scored step and 0.6 at each of the others, 0.45 on average; a
    lead of -0.6 costs 0.15, since the prefilter picks nothing at the others."""
    config = SelectionConfig(
        strategy="random",
        controller=ControllerConfig(**{**SETTINGS, "window": 4, "cost": 0.0}),
        domain_bandit=DomainBanditConfig(enabled=True, move_every=2, step_size=1e-6),
        prefilter=PrefilterConfig(pool_ratio=4, every_step=every_step),
    )
    made = build_strategy(config, ("a", "b", "c"), PRIOR)
    steps = [picked_step(made, number, 1.0, picked) for number in range(0, 24, 2)]
    said = [found for found in steps if "controller_all" in found][-1]
    unit = (1.0 + picked) / 2
    assert said["controller_all"] == pytest.approx(1.0 / unit, abs=0.02)
    assert said["controller_drawn"] == pytest.approx(drawn / unit, abs=0.1)


def test_nothing_is_picked_while_scoring_is_suspended():
    """Guards against a suspension whose steps are no uniform draws: what was learnt long ago would go on choosing."""
    config = SelectionConfig(
        strategy="random",
        controller=ControllerConfig(**{**SETTINGS, "cost": 2.0}),
        domain_bandit=DomainBanditConfig(enabled=True, move_every=2),
        prefilter=PrefilterConfig(pool_ratio=4, every_step=True),
    )
    made = build_strategy(config, ("a", "b", "c"), PRIOR)
    picks = []
    for number in range(12):
        picks.append(made.picks_at(number))
        picked_step(made, number, 1.0, 1.0)
    assert picks == [True] * 5 + [False] * 7


def test_halves_that_are_missing_are_an_error():
    """Guards against a controller that takes the utilities at their word where no half of the proxy was measured."""
    candidates = Candidates(step=0, sample_ids=np.arange(4), domains=np.zeros(4, dtype=np.int32))
    found = Signals(alignment=torch.arange(4).double(), interaction=torch.eye(4).double())
    with pytest.raises(ValueError, match="expected the alignment with each half of the proxy"):
        controlled().select(candidates, found, 2, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changed", [{"proxy_batch_size": 1}, {"proxy_momentum": 0.5}, {"proxy_refresh_every": 2}])
def test_proxies_without_independent_halves_are_refused(changed):
    """Guards against halves that share what they say: an average, a proxy that is kept, a batch of one."""
    with pytest.raises(ConfigError, match=r"selection.controller: compares what two halves"):
        from_dict({**SMALL, "selection": {"strategy": "opus", "controller": {"enabled": True}, **changed}})


def test_its_state_is_what_a_resumed_run_needs():
    """Guards against a window, an interval or the next probe missing from the checkpoint."""
    for cut_at in (2, 3, 5, 9):
        whole, cut, resumed = controlled(), controlled(), controlled()
        for number in range(cut_at):
            step(whole, number, 0.1)
            step(cut, number, 0.1)
        resumed.load_state_dict(cut.state_dict())
        assert scored_steps(whole, 0.1, range(cut_at, 20)) == scored_steps(resumed, 0.1, range(cut_at, 20))
