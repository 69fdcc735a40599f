from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opus.selection import reference
from megatron_opus.selection.precondition import (
    adam_kappa,
    exact_multiplier,
    fragment_sums,
    muon_kappa,
    muon_multiplier,
    muon_side,
    separable_factors,
)
from megatron_opus.types import AdamHyper, Fragment, MuonHyper

HYPER = AdamHyper(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, step=7)


def test_kappa_times_d_is_how_torch_adamw_answers_a_gradient():
    """Fault: a bias correction off by one step, or the learning rate applied twice.

    The same step of torch's AdamW is taken with g = 0 and with g = 1e-7: the difference is -kappa D g, but for v, which
    moves to beta2 v with the correction of step t + 1 in the real step while method.md Eq. 9 freezes it at t.
    """
    lr, beta2 = 1e-2, 0.95
    p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(0.9, beta2), eps=1e-8, weight_decay=0.0)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        p.grad = torch.randn(5, generator=g, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[p]
    hyper = AdamHyper(lr=lr, beta1=0.9, beta2=beta2, eps=1e-8, step=int(state["step"]))
    assert hyper.step == 3
    frozen = adam_kappa(hyper) * exact_multiplier(state["exp_avg_sq"], hyper)
    moved = ((1 - beta2**4) / (beta2 * (1 - beta2**3))) ** 0.5
    saved = (p.detach().clone(), {k: v.clone() for k, v in state.items()})
    after = []
    for value in (0.0, 1e-7):
        p.data.copy_(saved[0])
        for key, old in saved[1].items():
            state[key].copy_(old)
        p.grad = torch.full((5,), value, dtype=torch.float64)
        optimizer.step()
        after.append(p.detach().clone())
    torch.testing.assert_close((after[0] - after[1]) / 1e-7, frozen * moved, rtol=1e-5, atol=0)


def test_separable_is_exact_on_rank_one_moments():
    """Fault: averaging square roots, or losing the total, changes the exponents of the factors."""
    g = torch.Generator().manual_seed(0)
    row, col = torch.rand(9, generator=g) + 0.1, torch.rand(13, generator=g) + 0.1
    v = 1e-4 * torch.outer(row, col).double()
    r, c = separable_factors(v.sum(1), v.sum(0), HYPER)
    torch.testing.assert_close(torch.outer(r, c).double(), exact_multiplier(v, HYPER), rtol=1e-5, atol=0)


@pytest.mark.parametrize("root", [1e-12, 1e-10, 1e-8, 1e-7, 1e-4, 1.0])
@pytest.mark.parametrize("eps", [1e-8, 1e-5])
def test_eps_counts_as_it_does_in_adamw(root, eps):
    """Fault: an eps that is split over rows and columns correctly only where it does not matter: layers with small
    second moments are then weighted down many times over."""
    hyper = AdamHyper(lr=1.0, beta1=0.9, beta2=0.95, eps=eps, step=5)
    v = torch.full((4, 6), root**2 * (1 - 0.95**5), dtype=torch.float64)
    r, c = separable_factors(v.sum(1), v.sum(0), hyper)
    torch.testing.assert_close(torch.outer(r, c).double(), exact_multiplier(v, hyper), rtol=1e-5, atol=0)


@pytest.mark.parametrize("zero", ["row", "column", "all"])
def test_separable_stays_finite_without_moments(zero):
    """Fault: a dead unit (v = 0) makes D infinite and every utility NaN. Its true D is 1 / eps; the separable
    form gives 2 / eps times mean(x) / x_i, and x varies by less than 2 here."""
    v = (0.3 + torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)) * 1e-6
    if zero in {"row", "all"}:
        v[2 if zero == "row" else slice(None)] = 0
    if zero == "column":
        v[:, 3] = 0
    r, c = separable_factors(v.sum(1), v.sum(0), HYPER)
    outer = torch.outer(r.double(), c.double())
    assert torch.isfinite(outer).all()
    assert outer.max() <= 4 / HYPER.eps
    if zero == "all":
        torch.testing.assert_close(outer, torch.full_like(outer, 1 / HYPER.eps), rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_fragments_that_cut_rows_add_up(rows, cols, data):
    """Fault: a row-sharded second moment used as if it were the whole matrix (defect 2 of the reference).

    Exact in float64 for small integers.
    """
    v = torch.arange(rows * cols, dtype=torch.float32) + 1
    points = sorted(data.draw(st.sets(st.integers(0, rows * cols), max_size=4)) | {0, rows * cols})
    row_total, col_total = torch.zeros(rows, dtype=torch.float64), torch.zeros(cols, dtype=torch.float64)
    for a, b in itertools.pairwise(points):
        row, col = fragment_sums(Fragment(start=a, values=v[a:b]), rows, cols)
        row_total += row
        col_total += col
    whole = v.view(rows, cols).double()
    assert torch.equal(row_total, whole.sum(1))
    assert torch.equal(col_total, whole.sum(0))


def test_a_fragment_of_another_parameter_is_refused():
    """Fault: optimizer state matched by index instead of name reads another parameter's fragment."""
    with pytest.raises(ValueError, match="another parameter"):
        fragment_sums(Fragment(start=10, values=torch.ones(10)), 3, 5)


NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def muon(**changes):
    return MuonHyper(
        **{
            "lr": 0.02,
            "momentum": 0.95,
            "nesterov": True,
            "scale": 1.5,
            "coefficients": NEWTON_SCHULZ,
            "step": 3,
            **changes,
        }
    )


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_the_muon_multiplier_is_the_polynomial_of_the_momentum(shape):
    """Fault: the recursion on the Gram side loses a factor, or stands on the larger side. S q must be the
    Newton-Schulz iterate of q, computed by iterating on q itself, to float32 rounding amplified by 3.4^5."""
    q = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    s = muon_multiplier(q, NEWTON_SCHULZ)
    found = s @ q if muon_side(*shape) == "rows" else q @ s
    x = (q.T if shape[0] > shape[1] else q).double()
    x = x / x.norm()
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if shape[0] > shape[1] else x
    assert s.shape == (min(shape), min(shape))
    assert torch.equal(s, s.T)
    torch.testing.assert_close(found.double(), x, rtol=1e-3, atol=1e-4)
    assert torch.linalg.svdvals(found).min() > 0.6  # orthogonalised: all singular values near 1
    assert torch.linalg.svdvals(found).max() < 1.3


def test_the_muon_multiplier_agrees_with_the_oracle():
    """Fault: kappa without Nesterov's (1 + mu), the scale forgotten, or the transpose rule of another shape."""
    g = torch.Generator().manual_seed(1)
    for shape in ((12, 20), (20, 12)):
        q, gradient = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        for nesterov in (True, False):
            hyper = muon(nesterov=nesterov)
            truth = reference.muon_preconditioner({"w": q}, {"w": hyper})({"w": gradient.double()})["w"]
            s = muon_multiplier(q.double(), hyper.coefficients)
            one_sided = s @ gradient.double() if muon_side(*shape) == "rows" else gradient.double() @ s
            torch.testing.assert_close(muon_kappa(hyper) * one_sided, truth, rtol=1e-8, atol=1e-10)
    assert muon_kappa(muon()) == pytest.approx(0.02 * 1.5 * (1 - 0.95**2))


def test_a_momentum_of_zeros_gives_no_nan():
    """Fault: 0 / 0 in a layer without gradient makes every utility NaN."""
    assert torch.equal(muon_multiplier(torch.zeros(3, 5), NEWTON_SCHULZ), torch.zeros(3, 3))


def test_a_single_newton_schulz_step_hardly_preconditions():
    """Fault: the paper's one-step multiplier taken for Muon's geometry: its singular values spread so little that the
    scores are SGD's (method.md section 3); all five steps spread them as the momentum's own do."""
    g = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(24, 24, generator=g)).Q for _ in range(2))
    q = u @ torch.diag(torch.logspace(0, -3, 24)) @ v
    spread = [torch.linalg.svdvals(muon_multiplier(q, NEWTON_SCHULZ[:k])) for k in (1, 5)]
    assert spread[0][0] / spread[0][-1] < 6
    assert spread[1][0] / spread[1][-1] > 100
