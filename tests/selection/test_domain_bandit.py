"""Domain shares that follow the utilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_opus.config import ConfigError, DomainBanditConfig, FloorsConfig, SelectionConfig
from megatron_opus.config.load import from_dict
from megatron_opus.selection.strategies import build_strategy
from megatron_opus.types import Candidates, Signals

NAMES, PRIOR = ("good", "plain", "bad", "unused"), np.array([0.2, 0.4, 0.4, 0.0])
SMALL = {"name": "x", "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}}


def bandit(strategy="random", floors=None, **settings):
    config = SelectionConfig(
        strategy=strategy,
        floors=floors or FloorsConfig(),
        domain_bandit=DomainBanditConfig(enabled=True, **{"move_every": 1, **settings}),
    )
    return build_strategy(config, NAMES, PRIOR, np.full(4, 0.9), 8)


def step(strategy, number, signals=True, n=20, values=(3.0, 1.0, 0.0)):
    domains = np.arange(n, dtype=np.int32) % 3
    candidates = Candidates(step=number, sample_ids=np.arange(n), domains=domains)
    noise = torch.randn(n, generator=torch.Generator().manual_seed(number), dtype=torch.float64) / 4
    align = torch.tensor(values, dtype=torch.float64)[torch.from_numpy(domains).long()] + noise
    found = Signals(alignment=align, interaction=torch.eye(n).double()) if signals else Signals()
    return strategy.select(candidates, found, 8, torch.Generator().manual_seed(number))


def test_shares_follow_the_formula():
    """Guards against utilities in their raw unit, a mean over the drawn alone, and a move that is applied twice."""
    made = bandit(step_size=0.5, memory=0.8)
    candidates = Candidates(step=0, sample_ids=np.arange(4), domains=np.array([0, 0, 1, 2], dtype=np.int32))
    utility = np.array([4.0, 2.0, 1.0, -3.0])
    made.select(candidates, Signals(alignment=torch.from_numpy(utility)), 2, torch.Generator().manual_seed(0))
    gain = (utility - utility.mean()) / utility.std()
    log = 0.5 * np.array([gain[:2].mean(), gain[2], gain[3]])
    expected = PRIOR[:3] * np.exp(log)
    np.testing.assert_allclose(made.domain_weights(1).numpy(), [*(expected / expected.sum()), 0], rtol=1e-9)
    candidates = Candidates(step=1, sample_ids=np.arange(2), domains=np.array([1, 2], dtype=np.int32))
    made.select(candidates, Signals(alignment=torch.tensor([1.0, -1.0]).double()), 1, torch.Generator().manual_seed(0))
    expected = PRIOR[:3] * np.exp(0.8 * log + 0.5 * np.array([0, 1, -1]))
    np.testing.assert_allclose(made.domain_weights(2).numpy(), [*(expected / expected.sum()), 0], rtol=1e-9)


def test_shares_move_toward_what_helps_and_stay_within_bounds():
    """Guards against a share that dies, grows beyond what its domain has, or is given to a domain without weight."""
    made = bandit(memory=1.0, min_share=0.05)
    for number in range(60):
        step(made, number)
    shares = made.domain_weights(60).numpy()
    assert shares[0] > 0.85
    np.testing.assert_allclose(shares[2:], [0.05, 0])
    assert shares.sum() == pytest.approx(1)
    owed = bandit(memory=1.0, floors=FloorsConfig(minimum={"bad": 0.5}))
    for number in range(60):
        step(owed, number)
    assert owed.domain_weights(60).numpy()[2] >= 0.25  # 4 of K = 8 in a buffer of N = 16


def test_only_every_nth_step_is_scored_and_moves():
    """Guards against scoring that is paid for and not used, and moves whose number depends on who else scores."""
    alone, under = bandit(move_every=4), bandit("opus", move_every=4)
    assert alone.needs == under.needs == {"ghost"}
    scored = []
    for number in range(9):
        scored.append(alone.scores_at(number))
        assert under.scores_at(number)
        step(alone, number, signals=scored[-1])
        step(under, number)
    assert [i for i, yes in enumerate(scored) if yes] == [0, 4, 8]
    np.testing.assert_allclose(alone.domain_weights(9).numpy(), under.domain_weights(9).numpy())


def test_within_its_domains_the_bandit_draws_uniformly():
    """Guards against a bandit that also prefers candidates: it would be another strategy under its name."""
    plain = build_strategy(SelectionConfig(strategy="random"), NAMES)
    for number in range(3):
        assert step(bandit(), number).indices.tolist() == step(plain, number).indices.tolist()


def test_equal_or_broken_utilities_move_nothing():
    """Guards against 0 / 0, and a NaN that spreads to every share."""
    made = bandit()
    step(made, 0, values=(1.0, torch.nan, 1.0))
    before = made.domain_weights(1).numpy()
    assert np.isfinite(before).all()
    assert before[1] == pytest.approx(0.4, abs=0.03)  # nothing was heard of it
    c = Candidates(step=1, sample_ids=np.arange(3), domains=np.array([0, 1, 2], dtype=np.int32))
    made.select(c, Signals(alignment=torch.ones(3).double()), 1, torch.Generator().manual_seed(0))
    assert made.domain_weights(2).numpy().tolist() == before.tolist()


def test_its_state_is_what_a_resumed_run_needs():
    """Guards against log weights or the step of the last move missing from the checkpoint."""
    whole, cut, resumed = bandit("opus", move_every=3), bandit("opus", move_every=3), bandit("opus", move_every=3)
    for number in range(5):
        step(whole, number)
        step(cut, number)
    resumed.load_state_dict(cut.state_dict())
    for number in range(5, 9):
        assert whole.scores_at(number) == resumed.scores_at(number)
        assert step(whole, number).indices.tolist() == step(resumed, number).indices.tolist()
    assert whole.domain_weights(9).tolist() == resumed.domain_weights(9).tolist()
    with pytest.raises(ValueError, match="domain bandit: expected the state of the domains"):
        resumed.load_state_dict({**cut.state_dict(), "domains": ["other"]})


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"domain_bandit": {"enabled": True}, "ado": {"enabled": True}}, "ADO decides the domain shares already"),
        ({"domain_bandit": {"enabled": True}, "strategy": "high_ppl"}, "high_ppl computes losses and no utilities"),
        ({"domain_bandit": {"enabled": True}, "scope": "rank_local"}, "domain_bandit: needs the utilities of all"),
        ({"controller": {"enabled": True}, "strategy": "random"}, "random has no utilities that could pay"),
        ({"controller": {"enabled": True}, "scope": "rank_local"}, "controller: needs the utilities of all"),
        ({"prefilter": {"pool_ratio": 2}, "strategy": "random"}, "random scores nothing that a model could learn"),
        ({"prefilter": {"pool_ratio": 2, "columns": 1000}}, "columns: expected a power of two"),
    ],
)
def test_what_cannot_go_together_is_refused(selection, said):
    """Guards against a combination in which one of the two mechanisms is silently without effect."""
    with pytest.raises(ConfigError, match=said):
        from_dict({**SMALL, "selection": selection})
