"""What each strategy chooses, on small buffers where the right answer is plain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_opus.config import FilterThenWeightConfig, RedundancyConfig, SelectionConfig
from megatron_opus.selection import reference
from megatron_opus.selection.nnls import kkt_violation, nnls
from megatron_opus.selection.strategies import build_strategy, scoring_config
from megatron_opus.selection.strategies.filter_then_weight import matching_pursuit
from megatron_opus.types import Candidates, Signals


def candidates(n):
    return Candidates(step=0, sample_ids=np.arange(n), domains=np.zeros(n, dtype=np.int32))


def select(kind, signals, k, seed=0, **settings):
    strategy = build_strategy(SelectionConfig(strategy=kind, **settings), ("only",))
    n = len(signals.loss if signals.alignment is None else signals.alignment)
    return strategy.select(candidates(n), signals, k, torch.Generator().manual_seed(seed))


def geometry(n=12, dim=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    updates = torch.randn(n, dim, generator=g, dtype=torch.float64)
    target = torch.randn(dim, generator=g, dtype=torch.float64)
    return updates, target, Signals(alignment=updates @ target, interaction=updates @ updates.T)


# --- perplexity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"), [("high_ppl", [4, 1, 5]), ("low_ppl", [2, 0, 6]), ("middle_ppl", [6, 3, 5])]
)
def test_perplexity_picks_its_end_of_the_ranking(kind, expected):
    """Fault: high and low swapped, a middle around the mean instead of the median, or a NaN that sorts first.

    The usable losses in order: 2 (position), 0, 6, 3, 5, 1, 4; position 3 is the median."""
    loss = torch.tensor([1.0, 8.0, 0.5, 3.0, 90.0, 4.0, 2.0, torch.nan], dtype=torch.float64)
    drawn = select(kind, Signals(loss=loss), 3)
    assert sorted(drawn.indices.tolist()) == sorted(expected)
    assert drawn.diagnostics["excluded"] == 1
    assert torch.isnan(drawn.utility[7])


def test_perplexity_needs_a_forward_pass_only_and_falls_back_loudly():
    """Fault: a backward pass that nobody reads, or NaN losses that are trained on in silence."""
    assert build_strategy(SelectionConfig(strategy="high_ppl")).needs == {"loss"}
    drawn = select("low_ppl", Signals(loss=torch.tensor([1.0, torch.nan, torch.inf]).double()), 2)
    assert "1 of 3 candidates have a finite loss" in drawn.fallback


def test_equal_losses_go_to_the_earlier_position():
    """Fault: ties broken by an unstable sort, differently on another rank."""
    for kind in ("high_ppl", "low_ppl"):
        assert select(kind, Signals(loss=torch.ones(40).double()), 5).indices.tolist() == [0, 1, 2, 3, 4]


# --- greats ---------------------------------------------------------------------------------------------------------


def test_greats_is_the_plain_greedy_loop_in_the_geometry_of_sgd():
    """Fault: a draw with noise, an interaction that is not updated after each pick, or AdamW's preconditioner."""
    _, _, signals = geometry()
    drawn = select("greats", signals, 6, redundancy=RedundancyConfig(scale="paper"))
    assert drawn.indices.tolist() == reference.greedy(signals.alignment, signals.interaction, 6, 1.0)
    without = select("greats", signals, 6, redundancy=RedundancyConfig(scale="off")).indices.tolist()
    assert without == torch.topk(signals.alignment, 6).indices.tolist() != drawn.indices.tolist()
    assert scoring_config(SelectionConfig(strategy="greats")).preconditioner.kind == "sgd"
    assert scoring_config(SelectionConfig(strategy="opus")).preconditioner.kind == "auto"


# --- non-negative least squares -------------------------------------------------------------------------------------


def brute_force(gram, target):
    """The optimum over all active sets."""
    k, best, best_value = len(target), np.zeros(len(target)), 0.0
    for size in range(1, k + 1):
        for chosen in itertools.combinations(range(k), size):
            index = np.array(chosen)
            w = np.zeros(k)
            w[index] = np.linalg.solve(gram[np.ix_(index, index)], target[index])
            value = w @ gram @ w / 2 - target @ w
            if (w >= 0).all() and value < best_value:
                best, best_value = w, value
    return best


@pytest.mark.parametrize("seed", range(20))
def test_nnls_agrees_with_all_active_sets_tried(seed):
    """Fault: a sign in the update, or a descent that stops early. 2^6 active sets; the Gram matrix is definite, so the
    optimum is unique and 1e-8 is far above its conditioning."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, 20))
    gram, target = x @ x.T, x @ rng.standard_normal(20)
    w, sweeps = nnls(gram, target, max_sweeps=5000, tolerance=1e-12)
    assert sweeps < 5000
    np.testing.assert_allclose(w, brute_force(gram, target), atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 12), dim=st.integers(1, 16), seed=st.integers(0, 10**6), scale=st.sampled_from([1e-9, 1.0, 1e9])
)
@example(k=10, dim=6, seed=10626, scale=1e-9)
def test_nnls_satisfies_the_conditions_of_the_optimum(k, dim, seed, scale):
    """Fault: an answer that depends on the unit, or that is not optimal where the Gram matrix is singular (dim < k).

    1e-3: coordinate descent converges linearly, slowly for nearly parallel rows. The example is at 1.3e-3 after 20,000
    sweeps, at 4.7e-4 after 60,000."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((k, dim)) * scale
    gram, target = x @ x.T, x @ rng.standard_normal(dim)
    w, _ = nnls(gram, target, max_sweeps=60_000, tolerance=1e-9)
    assert (w >= 0).all()
    assert kkt_violation(gram, target, w) < 1e-3


# --- filter then weight ---------------------------------------------------------------------------------------------


def pursuit_by_vectors(updates, target, k):
    """Matching pursuit with the vectors themselves: a plain loop."""
    residual, picks = target.clone(), []
    for _ in range(k):
        scores = updates @ residual / updates.norm(dim=1)
        scores[picks] = -torch.inf
        best = int(scores.argmax())
        picks.append(best)
        residual -= max(0.0, float(updates[best] @ residual / updates[best].square().sum())) * updates[best]
    return picks


@pytest.mark.parametrize("seed", range(10))
def test_the_filter_follows_the_residual(seed):
    """Fault: a Gram row of the wrong candidate taken off the residual, which picks the same direction again."""
    updates, target, signals = geometry(seed=seed)
    picks, _ = matching_pursuit(signals.alignment, signals.interaction, 6, torch.ones(12, dtype=torch.bool))
    assert picks.tolist() == pursuit_by_vectors(updates, target, 6)


def test_a_copy_is_worth_little_and_weights_have_mean_one():
    """Fault: duplicates kept because each is well aligned by itself; weights that change the size of the update."""
    updates, target, _ = geometry(n=8, seed=3)
    updates[0] = 2 * target
    updates[1] = 2 * target + 1e-3 * updates[1]
    updates[2] = target + 3 * torch.nn.functional.normalize(updates[2], dim=0)
    signals = Signals(alignment=updates @ target, interaction=updates @ updates.T)
    drawn = select("filter_then_weight", signals, 4)
    assert drawn.weights.dtype == torch.float32
    assert drawn.weights.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert drawn.weights.min() >= 0
    first = drawn.indices.tolist()[0]
    assert first in (0, 1)
    assert drawn.diagnostics["nnls_violation"] < 1e-6
    again = select("filter_then_weight", signals, 4, seed=99)
    assert torch.equal(drawn.indices, again.indices)


def test_weights_minimise_the_distance_to_the_target_direction():
    """Fault: weights fitted to another target than the one stated. Scaled freely, no perturbation of the weights
    comes closer to the target direction."""
    updates, target, signals = geometry(seed=7)
    drawn = select("filter_then_weight", signals, 6)
    kept = updates[drawn.indices]

    def cosine(w):
        return torch.nn.functional.cosine_similarity(w @ kept, target, dim=0).item()

    g = torch.Generator().manual_seed(0)
    best = cosine(drawn.weights.double())
    for _ in range(200):
        other = (drawn.weights.double() + 0.1 * torch.randn(6, generator=g, dtype=torch.float64)).clamp(min=0)
        assert cosine(other) <= best + 1e-9


def test_nothing_aligned_falls_back_and_bad_candidates_are_left_out():
    """Fault: weights of 0/0 when no candidate helps; a NaN row that poisons every residual."""
    _, _, signals = geometry(seed=1)
    against = Signals(alignment=-signals.alignment.abs(), interaction=signals.interaction)
    assert "none of 12 candidates is aligned" in select("filter_then_weight", against, 4).fallback
    align, inter = signals.alignment.clone(), signals.interaction.clone()
    align[5], inter[5], inter[:, 5] = torch.nan, torch.nan, torch.nan
    inter[7], inter[:, 7], align[7] = 0.0, 0.0, 0.0
    drawn = select("filter_then_weight", Signals(alignment=align, interaction=inter), 6)
    assert not {5, 7} & set(drawn.indices.tolist())
    assert torch.isfinite(drawn.weights).all()
    assert drawn.diagnostics["excluded"] == 2
    assert FilterThenWeightConfig().max_sweeps > 0
