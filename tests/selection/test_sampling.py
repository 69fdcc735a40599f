from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opus.config import RedundancyConfig, SelectionConfig
from megatron_opus.selection import reference, sampling, utility
from megatron_opus.selection.strategies import OpusStrategy, RandomStrategy
from megatron_opus.types import Candidates, Signals


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_scores(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 20, generator=g, dtype=torch.float64)
    return features @ torch.randn(20, generator=g, dtype=torch.float64), features @ features.T


def candidates(n):
    return Candidates(step=0, sample_ids=np.arange(n), domains=np.zeros(n, dtype=np.int32))


def test_boltzmann_draws_have_the_stated_probabilities():
    """Fault: noise on the wrong scale. First-draw frequencies over 4000 generators, chi-square with 5 degrees of
    freedom below its 99.9% point (20.5)."""
    align = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], dtype=torch.float64)
    p = torch.softmax(align / 0.9, 0)
    counts = torch.zeros(6, dtype=torch.float64)
    for seed in range(4000):
        result = sampling.draw(align, None, 2, generator=generator(seed), temperature=0.9, temperature_unit="absolute")
        counts[result.indices[0]] += 1
    assert ((counts - 4000 * p) ** 2 / (4000 * p)).sum() < 20.5


def pair_counts(runs, **options):
    """[N, N] how often (first, second) was drawn by generators 0 .. runs - 1."""
    align = torch.tensor([0.0, 0.4, 0.9, 1.5], dtype=torch.float64)
    inter = torch.tensor(
        [[1.0, 0.8, -0.5, 0.0], [0.8, 1.0, 0.3, 0.0], [-0.5, 0.3, 1.0, 0.9], [0.0, 0.0, 0.9, 1.0]], dtype=torch.float64
    )
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(runs):
        first, second = sampling.draw(
            align, inter, 2, generator=generator(seed), temperature=0.9, temperature_unit="absolute", **options
        ).indices.tolist()
        counts[first, second] += 1
    return align / 0.9, inter / 0.9, counts


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_pairs_of_draws_have_the_probabilities_of_sequential_draws(scale):
    """Fault: the shortcut without redundancy (one sort) draws from another distribution than one draw after the other;
    noise that is used again after the utilities have changed. Chi-square of the 12 ordered pairs, 11 degrees of
    freedom, below its 99.9% point (31.3). Taking one noise vector for all draws with redundancy gives 180."""
    logits, inter, counts = pair_counts(6000, redundancy_scale=scale)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for first, p in enumerate(torch.softmax(logits, 0)):
        left = logits - scale * inter[:, first]
        left[first] = -math.inf
        expected[first] = 6000 * p * torch.softmax(left, 0)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 31.3


def test_draws_never_wait_for_a_device():
    """Fault: an .item() or a branch on a tensor for each of K draws, which stops a GPU's queue K times."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    align, inter = random_scores(64)
    counts = []
    for k in (2, 48):
        with Reads() as reads:
            sampling.draw(align, inter, k, generator=generator(), temperature=0.9, redundancy_scale=0.1)
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 4


def test_every_mode_takes_the_same_from_the_generator():
    """Fault: switching redundancy off changes the later draws of the run as well, so that ablations differ by noise."""
    align, inter = random_scores()
    states = []
    for options in ({}, {"greedy": True}, {"redundancy_scale": 0.1}):
        g = generator(3)
        sampling.draw(align, inter, 5, generator=g, temperature=0.9, **options)
        states.append(g.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_one_outlier_does_not_flatten_the_draw_in_robust_units():
    """Fault: one candidate with a huge utility makes the standard deviation, and with it the temperature, so large
    that all others are drawn uniformly."""
    align, _ = random_scores(64)
    with_outlier = torch.cat([align, align.new_tensor([1e4 * align.std().item()])])

    def ratio(values, unit):
        """How much likelier the best of the ordinary 64 is drawn than their worst, in logarithms."""
        drawn = sampling.draw(values, None, 8, generator=generator(), temperature=0.9, temperature_unit=unit)
        return ((align.max() - align.min()) / drawn.temperature).item()

    assert ratio(with_outlier, "std") < 0.01
    assert ratio(with_outlier, "mad") == pytest.approx(ratio(align, "mad"), rel=0.05)
    normal = torch.randn(4000, generator=generator(), dtype=torch.float64)
    assert sampling.spread(normal, "mad") == pytest.approx(1.0, rel=0.05)
    constant = torch.zeros(9, dtype=torch.float64)
    constant[0] = 1.0
    assert sampling.spread(constant, "mad") == sampling.spread(constant, "std") > 0


def test_a_poisoned_row_does_not_enter_the_draws_of_others():
    """Fault: the interaction with an excluded candidate is NaN; added to a history it is the largest score of all."""
    align, inter = random_scores()
    inter[3], inter[:, 3] = math.nan, math.nan
    eligible = torch.ones(12, dtype=torch.bool)
    eligible[3] = False
    drawn = sampling.draw(
        align, inter, 11, generator=generator(), temperature=0.9, redundancy_scale=0.2, eligible=eligible
    )
    assert sorted(drawn.indices.tolist()) == [i for i in range(12) if i != 3]
    assert torch.isfinite(drawn.redundancy).all()


def test_greedy_follows_the_plain_loop():
    """Fault: redundancy recomputed from the wrong history, or applied to the candidate just drawn."""
    for seed in range(20):
        align, inter = random_scores(seed=seed)
        result = sampling.draw(
            align, inter, 6, generator=generator(), temperature=1.0, greedy=True, redundancy_scale=0.3
        )
        assert result.indices.tolist() == reference.greedy(align, inter, 6, 0.3)
        for position, z in enumerate(result.indices.tolist()):
            history = 0.3 * inter[z, result.indices[:position]].sum()
            torch.testing.assert_close(result.redundancy[z], history)


def test_draws_are_distinct_and_deterministic():
    """Fault: a candidate drawn twice, or a global RNG behind the draws (defect 8 of the reference)."""
    align, inter = random_scores()
    torch.manual_seed(1)
    first = sampling.draw(align, inter, 12, generator=generator(5), temperature=0.9, redundancy_scale=0.1)
    torch.manual_seed(2)
    again = sampling.draw(align, inter, 12, generator=generator(5), temperature=0.9, redundancy_scale=0.1)
    assert sorted(first.indices.tolist()) == list(range(12))
    assert first.indices.tolist() == again.indices.tolist()


def test_temperature_in_standard_deviations_ignores_the_unit_of_utility():
    """Fault: with an absolute tau = 0.9 and utilities of 1e-6 selection is silently uniform."""
    align, _ = random_scores(32)
    picks = [
        sampling.draw(scale * align, None, 8, generator=generator(3), temperature=0.9).indices.tolist()
        for scale in (1e-9, 1.0, 1e9)
    ]
    assert picks[0] == picks[1] == picks[2]
    flat = sampling.draw(1e-6 * align, None, 8, generator=generator(3), temperature=0.9, temperature_unit="absolute")
    assert flat.entropy_ratio > 0.99
    assert sampling.draw(align, None, 8, generator=generator(3), temperature=0.9).entropy_ratio < 0.95


def test_matched_redundancy_has_the_stated_size():
    """Fault: a redundancy term without a scale of its own vanishes or dominates with the learning rate."""
    align, inter = random_scores(40, seed=4)
    config = RedundancyConfig(scale="matched", fraction=0.25)
    for unit in (1e-8, 1.0, 1e4):
        scale = utility.redundancy_scale(align * unit, inter * unit**2, 20, config)
        others = (inter.sum(1) - inter.diagonal()) / 39 * unit**2
        assert scale * (others.abs().mean() * 10) == pytest.approx(0.25 * (align * unit).std().item())
    assert utility.redundancy_scale(align, inter, 20, RedundancyConfig(scale="off")) == 0
    assert utility.redundancy_scale(align, inter, 20, RedundancyConfig(scale="paper")) == 1


def test_non_finite_candidates_are_never_drawn():
    """Fault: one NaN candidate poisons the softmax and with it the whole batch."""
    align, inter = random_scores()
    align[3], inter[3], inter[:, 3] = math.nan, math.nan, math.nan
    align[7] = math.inf
    signals = Signals(alignment=align, interaction=inter, finite=torch.isfinite(align))
    selection = OpusStrategy(SelectionConfig()).select(candidates(12), signals, 10, generator())
    assert sorted(selection.indices.tolist()) == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert selection.diagnostics["excluded"] == 2
    assert all(math.isfinite(v) for v in selection.diagnostics.values())


def test_too_few_finite_candidates_fall_back_and_say_so():
    """Fault: a silent fallback."""
    align = torch.full((12,), math.nan, dtype=torch.float64)
    signals = Signals(alignment=align, interaction=torch.full((12, 12), math.nan, dtype=torch.float64))
    selection = OpusStrategy(SelectionConfig()).select(candidates(12), signals, 6, generator())
    assert "0 of 12" in selection.fallback
    assert len(set(selection.indices.tolist())) == 6


def test_equal_utilities_fall_back_and_say_so():
    """Fault: a capture that yields no gradients scores everything zero and selection is silently uniform (defect 4)."""
    signals = Signals(alignment=torch.zeros(12, dtype=torch.float64), interaction=torch.zeros(12, 12).double())
    selection = OpusStrategy(SelectionConfig()).select(candidates(12), signals, 6, generator())
    assert "equal" in selection.fallback


def test_random_selection_is_uniform_and_seeded():
    """Fault: a biased baseline flatters every strategy compared with it."""
    counts = torch.zeros(8)
    for seed in range(2000):
        counts[RandomStrategy().select(candidates(8), Signals(), 4, generator(seed)).indices] += 1
    assert (counts - 1000).abs().max() < 4 * (2000 * 0.25) ** 0.5
