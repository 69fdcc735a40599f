"""Scaling-law fits on curves whose law is known."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_opus.selection.scaling_law import FitError, ScalingLaw, fit

N = np.arange(1, 101) * 160.0 + 1600


def curve(law: ScalingLaw, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    chance = np.random.default_rng(seed).standard_normal(len(N))
    return np.array([law.loss(n) for n in N]) * np.exp(noise * chance)


@pytest.mark.parametrize(
    ("alpha", "beta", "epsilon"), [(0.3, 8.0, 2.2), (0.5, 20.0, 1.8), (0.15, 5.0, 2.0), (0.7, 100.0, 3.0)]
)
def test_the_law_of_a_clean_curve_is_found(alpha, beta, epsilon):
    """Fault: a local minimum, or a bound that is applied to another parameter. Without noise the optimum is exact; the
    tolerance is what the descent leaves along the valley of (beta, epsilon, alpha)."""
    found = fit(N, curve(ScalingLaw(alpha=alpha, beta=beta, epsilon=epsilon)))
    assert found.alpha == pytest.approx(alpha, rel=0.01)
    assert found.beta == pytest.approx(beta, rel=0.02)
    assert found.epsilon == pytest.approx(epsilon, rel=0.01)
    assert found.residual < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_noise_leaves_the_slope(seed):
    """Fault: a fit that follows the noise. The three parameters are hardly determined by a short noisy curve, their
    combination that ADO uses is: with 1% noise on 100 points the slope is within 25%."""
    law = ScalingLaw(alpha=0.3, beta=8.0, epsilon=2.2)
    found = fit(N, curve(law, noise=0.01, seed=seed))
    assert found.slope(N[-1]) == pytest.approx(law.slope(N[-1]), rel=0.25)
    assert found.loss(N[-1]) == pytest.approx(law.loss(N[-1]), rel=0.01)


def test_outliers_do_not_pull_the_fit():
    """Fault: squared errors in place of Huber's. Two of 100 points are 30% high."""
    law = ScalingLaw(alpha=0.3, beta=8.0, epsilon=2.2)
    losses = curve(law)
    losses[[20, 70]] *= 1.3
    found = fit(N, losses)
    assert found.slope(N[-1]) == pytest.approx(law.slope(N[-1]), rel=0.02)


def test_the_same_curve_gives_the_same_law():
    """Fault: a random start, which gives every rank another mixture."""
    losses = curve(ScalingLaw(alpha=0.4, beta=9.0, epsilon=2.0), noise=0.02)
    assert fit(N, losses) == fit(N, losses)


def test_bounds_hold():
    """Fault: an exponent or an irreducible loss outside of what is published, on a curve that asks for it."""
    found = fit(N, curve(ScalingLaw(alpha=1.0, beta=2000.0, epsilon=1.6)))
    assert 0 < found.alpha < 0.8
    assert found.beta < np.exp(6.5)
    assert found.epsilon > np.exp(0.5)
    assert fit(N, curve(ScalingLaw(alpha=0.3, beta=8.0, epsilon=1.0)), min_log_epsilon=-2).epsilon == pytest.approx(
        1.0, rel=0.02
    )


def test_a_flat_curve_gains_nothing():
    """Fault: a saturated domain that keeps its share because its slope is noise."""
    law = ScalingLaw(alpha=0.3, beta=8.0, epsilon=2.2)
    assert fit(N, np.full(100, 2.5)).slope(N[-1]) < 0.02 * law.slope(N[-1])


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (np.full(7, 3.0), "7 points of the loss curve, need 8"),
        (np.array([3.0] * 20 + [np.nan]), "not a positive number"),
        (np.array([3.0, 30.0] * 20), "not a power law"),
    ],
)
def test_what_is_no_curve_is_refused(losses, said):
    """Fault: parameters without meaning that steer the mixture."""
    with pytest.raises(FitError, match=said):
        fit(N[: len(losses)], losses)
