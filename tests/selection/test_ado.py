"""The mixture that ADO makes of known learning curves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from forms import mostly_whole
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opus.config import AdoConfig, ConfigError, FloorsConfig, SelectionConfig
from megatron_opus.data.buffer import systematic_counts
from megatron_opus.selection.scaling_law import ScalingLaw
from megatron_opus.selection.shares import clipped
from megatron_opus.selection.strategies import AdoStrategy, RandomStrategy, build_strategy
from megatron_opus.types import Candidates, Signals

CONFIG = AdoConfig(enabled=True, skip_steps=4, first_fit=40, refit_every=40, block_steps=2)
LAWS = {
    "steep": ScalingLaw(alpha=0.6, beta=60.0, epsilon=1.9),
    "flat": ScalingLaw(alpha=0.05, beta=1.0, epsilon=2.0),
    "absent": None,
}
PRIOR = np.array([0.3, 0.6, 0.1])
N, K = 40, 20


def ado(config=CONFIG, **more):
    return AdoStrategy(RandomStrategy(), config, tuple(LAWS), PRIOR, **more)


def live(strategy, first, last, noise=0.0, supply=(1.0, 1.0, 0.0), broken=()):
    """Steps first..last-1: the buffer follows the policy (`supply` 0: no candidate ever), the losses follow LAWS."""
    policies = []
    for step in range(first, last):
        policy = strategy.domain_weights(step).numpy()
        policies.append(policy)
        shares = policy * np.array(supply)
        counts = np.floor(np.cumsum(shares / shares.sum()) * N + 0.5).astype(int)
        domains = np.repeat(np.arange(3), np.diff(counts, prepend=0)).astype(np.int32)
        candidates = Candidates(step=step, sample_ids=np.arange(N), domains=domains)
        drawn = strategy.select(candidates, Signals(), K, torch.Generator().manual_seed(step))
        chance = np.random.default_rng(step)
        n = (step + 1) * K
        losses = {}
        for d, (name, law) in enumerate(LAWS.items()):
            if (domains[drawn.indices] == d).any():
                assert law is not None
                losses[name] = law.loss(n) * float(np.exp(noise * chance.standard_normal()))
                if step in broken:
                    losses[name] = float("nan")
        strategy.observe(step, losses)
    return np.array(policies)


def test_the_mixture_moves_to_what_is_still_learnt():
    """Fault: a slope with the wrong sign, or the prior applied twice. The steep domain gains, the flat one loses, the
    one that never appears has no curve and keeps what is configured, within the clipping."""
    strategy = ado()
    policies = live(strategy, 0, 200, noise=0.005)
    assert np.allclose(policies[:40], PRIOR)  # nothing is known before the first fit
    np.testing.assert_allclose(policies.sum(1), 1.0)
    end = policies[-1]
    assert end[0] > 1.3 * PRIOR[0]
    assert end[1] < 0.85 * PRIOR[1]
    assert end[2] == pytest.approx(PRIOR[2], rel=0.02)
    assert policies.min() >= CONFIG.min_share - 1e-12
    assert any("no scaling law for absent (0 points" in line for line in strategy.notices())


def test_the_policy_is_the_published_one():
    """Fault: a running mean of the wrong thing, or a history fed before the policy is made. Algorithm 2 by hand, two
    steps after a fit, with the laws put in place."""
    strategy = ado()
    state = strategy.state_dict()
    laws = [law or ScalingLaw(alpha=0.2, beta=3.0, epsilon=2.0) for law in LAWS.values()]
    live(strategy, 0, 2)
    strategy.load_state_dict({**strategy.state_dict(), "laws": [vars(law) for law in laws], "domains": list(LAWS)})
    mean, history = PRIOR.copy(), PRIOR.copy()
    for step in (2, 3):
        live(strategy, step, step + 1)
        n = (step + 1) * K
        rho = PRIOR * np.array([law.slope(n) for law in laws]) * history**0.5
        rho /= rho.sum()
        policy = 0.1 * rho + 0.9 * mean
        assert policy.min() > CONFIG.min_share
        np.testing.assert_allclose(strategy.domain_weights(step + 1).numpy(), policy, rtol=1e-9)
        mean = (1 - 1 / (step + 2)) * mean + rho / (step + 2)
        history = 0.9 * history + 0.1 * policy
    assert state["laws"] == [None] * 3


def test_a_failed_fit_keeps_the_old_one_and_is_counted():
    """Fault: a mixture that jumps back, or to nonsense, when one fit fails; a failure that nobody hears of."""
    strategy = ado()
    live(strategy, 0, 41, noise=0.005)
    before = strategy.state_dict()
    assert before["laws"][0] is not None
    failed = before["failed"]
    strategy.notices()
    spoilt = {**before, "curve_loss": [[np.nan] * len(x) for x in before["curve_loss"]]}
    strategy.load_state_dict(spoilt)
    live(strategy, 41, 81, noise=0.005)
    after = strategy.state_dict()
    assert after["laws"] == before["laws"]
    assert after["failed"] == failed + 3
    said = strategy.notices()
    assert sum("the last fit stays" in line for line in said) == 2
    live(strategy, 81, 82)
    drawn = strategy.select(
        Candidates(step=82, sample_ids=np.arange(N), domains=np.zeros(N, dtype=np.int32)),
        Signals(),
        K,
        torch.Generator(),
    )
    assert drawn.diagnostics["ado_failed_fits"] == failed + 3
    assert drawn.diagnostics["ado_fitted"] == 2


def test_nan_losses_do_not_enter_the_curve():
    """Fault: one skipped step makes every later fit fail."""
    strategy = ado()
    live(strategy, 0, 80, broken=(10, 11, 33))
    state = strategy.state_dict()
    assert all(np.isfinite(x).all() for x in map(np.array, state["curve_loss"]))
    assert state["laws"][0] is not None


@pytest.fixture(scope="module")
def undisturbed():
    return live(ado(), 0, 90, noise=0.01)


@pytest.mark.parametrize("cut", mostly_whole([3, 39, 57], lambda cut: cut > 3))
def test_a_resumed_mixture_is_the_same_to_the_last_bit(cut, undisturbed, tmp_path):
    """Fault: half a block of losses, the history or the running mean missing from the checkpoint."""
    first = ado()
    live(first, 0, cut, noise=0.01)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = ado()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    assert (live(second, cut, 90, noise=0.01) == undisturbed[cut:]).all()


def test_a_share_never_exceeds_what_a_domain_holds():
    """Fault: a small steep domain whose share grows until the buffer refuses the draw in the middle of a run."""
    policies = live(ado(ceiling=np.array([0.35, 1.0, 1.0])), 0, 200)
    assert policies[-1][0] == pytest.approx(0.35, abs=1e-9)
    np.testing.assert_allclose(policies.sum(1), 1.0)


def test_the_mixture_supplies_the_floors():
    """Fault: a mixture that starves a domain of which the selection owes a share."""
    floors = FloorsConfig(minimum={"flat": 0.6})
    strategy = build_strategy(SelectionConfig(strategy="ado", ado=CONFIG, floors=floors), tuple(LAWS), PRIOR, k=K)
    policies = live(strategy, 0, 160)
    assert policies[:, 1].min() >= 0.3
    assert live(ado(), 0, 160)[:, 1].min() < 0.3  # without the floor it falls below
    held = [systematic_counts(policies[-1], N, offset)[1] for offset in np.linspace(0, 0.999, 50)]
    assert min(held) >= 12


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda x: sum(x) > 0.01),
    top=st.floats(0.26, 1.0),
    floor=st.floats(0.0, 0.2),
)
def test_clipping_gives_shares_within_their_bounds(shares, top, floor):
    """Fault: clip and renormalise, after which the bounds no longer hold."""
    result = clipped(np.array(shares), np.full(4, floor), np.full(4, top))
    assert result.sum() == pytest.approx(1.0)
    assert result.min() >= floor - 1e-9
    assert result.max() <= top + 1e-9


def test_composition_and_refusals():
    """Fault: `ado.enabled` beside opus that trains without the mixture, or without opus."""
    both = build_strategy(SelectionConfig(ado=CONFIG), tuple(LAWS), PRIOR)
    assert both.needs == {"ghost"}
    assert both.wants_domain_loss
    alone = build_strategy(SelectionConfig(strategy="ado"), tuple(LAWS), PRIOR)
    assert alone.needs == set()
    assert build_strategy(SelectionConfig(), tuple(LAWS), PRIOR).domain_weights(0) is None
    with pytest.raises(ConfigError, match="min_share"):
        ado(AdoConfig(min_share=0.5))
    with pytest.raises(ValueError, match="domains"):
        ado().load_state_dict({"domains": ["other"]})
