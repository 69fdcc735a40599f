"""What `megatron_opus.score` reads off an optimizer: the coming update as it will be, or a refusal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_oracle import EXACT, relative
from small_models import TinyGPT, random_batch, token_losses, train
from torch import Tensor

import megatron_opus
from megatron_opus.config import PreconditionerConfig
from megatron_opus.errors import UnsupportedOptimizer
from megatron_opus.selection import reference
from megatron_opus.types import AdamHyper, Signals

N, K_P = 5, 3
LATE = "blocks.1.fc1.weight"


def trained(steps: int = 3, **settings: Any) -> tuple[TinyGPT, torch.optim.Optimizer]:
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 2e-3, **settings})
    train(model, optimizer, steps)
    return model, optimizer


def score(model: TinyGPT, optimizer: torch.optim.Optimizer, form: str = "separable") -> Signals:
    sketch = dataclasses.replace(EXACT.sketch, operator="materialise", dim=1024)
    config = dataclasses.replace(EXACT, sketch=sketch, preconditioner=PreconditionerConfig(form=form))
    return megatron_opus.score(
        model, random_batch(N, seed=1), random_batch(K_P, seed=2), optimizer, config=config, interaction=False
    )


def each(optimizer: torch.optim.Optimizer, name: str, change: Callable[[Tensor], Any]) -> None:
    for state in optimizer.state.values():
        if state[name].dim() == 2:
            state[name] = change(state[name])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"maximize": True}, "maximize"),
        ({"amsgrad": True}, "amsgrad"),
        ({"lr": -1e-3}, "not negative, got -0.001"),
        ({"lr": float("nan")}, "finite"),
        ({"lr": torch.tensor([1e-3, 2e-3])}, r"shape \[2\]"),
        ({"betas": (0.9, float("nan"))}, "beta"),
        ({"eps": -1e-8}, "eps"),
        ({"eps": None}, "expected a number or a tensor as beta or eps, got None"),
        ({"betas": 0.9}, "expected two betas"),
        ({"lr": "1e-3"}, "expected a number or a tensor as learning rate, got '1e-3'"),
        ({"lr": None}, "as learning rate, got None"),
        ({"lr": 1j}, "as learning rate, got 1j"),
        ({"lr": True}, "as learning rate, got True"),
        ({"betas": None}, "expected two betas"),
        ({"betas": (0.9,)}, "expected two betas"),
    ],
)
def test_rates_that_are_no_rates_are_refused(settings: dict[str, Any], says: str) -> None:
    """Guards against scores with the wrong sign (an update up the gradient) or of a rate that is not one. Written into
    the groups, as schedules do: the optimizer's own checks come before."""
    model, optimizer = trained(amsgrad="amsgrad" in settings)
    for group in optimizer.param_groups:
        group.update(settings)
    with pytest.raises(UnsupportedOptimizer, match=says):
        score(model, optimizer)


def test_maximize_of_sgd_is_refused() -> None:
    """Guards against a check that only one kind of optimizer has."""
    model = TinyGPT()
    with pytest.raises(UnsupportedOptimizer, match="maximize"):
        score(model, torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))


def test_a_rate_in_a_tensor_is_a_rate() -> None:
    """Guards against capturable optimizers, which keep their rate in a tensor."""
    model, optimizer = trained()
    want = score(model, optimizer).alignment
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    assert relative(score(model, optimizer).alignment, want) < 1e-6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.index_fill(0, torch.tensor([0]), -1e-6), "not negative"),
        (lambda v: v.index_fill(0, torch.tensor([0]), float("nan")), "finite"),
        (lambda v: v.index_fill(0, torch.tensor([0]), float("inf")), "finite"),
        (lambda v: v.mT.contiguous(), "shape"),
        (lambda v: v.flatten(), "shape"),
        (lambda v: None, "second moment"),
    ],
)
def test_moments_that_are_no_moments_are_refused(change: Callable[[Tensor], Tensor], says: str) -> None:
    """Guards against moments that vanish in a row's sum (a negative one), take a weight out of the score without a
    word (an infinite one) or belong to another weight."""
    model, optimizer = trained()
    each(optimizer, "exp_avg_sq", change)
    with pytest.raises(UnsupportedOptimizer, match=says):
        score(model, optimizer)
    if says in ("not negative", "finite"):
        found = score(model, optimizer, "exact")
        assert found.finite is not None
        assert not found.finite.any()


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_a_subclass_with_a_step_of_its_own_is_another_optimizer(base: type[torch.optim.Optimizer]) -> None:
    """Guards against an optimizer that inherits Adam's or SGD's state, moves the weights otherwise (by signs, by norms
    of layers), and is scored in its parent's geometry."""

    class Same(base):  # type: ignore[valid-type,misc]
        pass

    class Other(base):  # type: ignore[valid-type,misc]
        def step(self, closure: Any = None) -> None:
            raise NotImplementedError

    model = TinyGPT()
    want = score(model, base(model.parameters(), lr=0.1)).alignment
    assert torch.equal(score(model, Same(model.parameters(), lr=0.1)).alignment, want)
    with pytest.raises(UnsupportedOptimizer, match="Other, whose geometry is not known"):
        score(model, Other(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(exp_avg_sq=None), "second moment under 'exp_avg_sq'"),
        (lambda s: s.update(exp_avg_sq=[1.0]), "dense tensor of real numbers"),
        (lambda s: s.update(exp_avg_sq=s["exp_avg_sq"].long()), "dense tensor of real numbers, got torch.int64"),
        (lambda s: s.update(exp_avg_sq=s["exp_avg_sq"] * 1j), "dense tensor of real numbers, got torch.complex64"),
        (lambda s: s.update(exp_avg_sq=s["exp_avg_sq"].to_sparse()), "dense tensor of real numbers"),
        (lambda s: s.update(exp_avg_sq=s["exp_avg_sq"].to("meta")), "dense tensor of real numbers"),
        (lambda s: s.pop("step"), "count of steps, got None"),
        (lambda s: s.update(step="3"), "as count of steps, got '3'"),
    ],
)
def test_a_state_of_another_kind_is_refused(change: Callable[[dict[str, Any]], Any], says: str) -> None:
    """Guards against a second moment that is taken for absent, or cut to integers: the weight then moves by 1 / eps, or
    in another geometry than the rest, and its scores drown those of all others without a word; and against moments
    of many steps whose bias is corrected as if they were those of the first."""
    model, optimizer = trained()
    for state in optimizer.state.values():
        change(state)
    with pytest.raises(UnsupportedOptimizer, match=says):
        score(model, optimizer)


def test_adam_without_an_epsilon() -> None:
    """Guards against a division by zero for eps = 0, which torch allows; the limit of a small eps is right."""
    alignments = []
    for eps in (0.0, 1e-30):
        model, optimizer = trained()
        for group in optimizer.param_groups:
            group["eps"] = eps
        alignments.append(score(model, optimizer).alignment)
    assert relative(*alignments) < 1e-6


def test_a_weight_without_state_does_not_change_the_others() -> None:
    """Guards against one weight that was never updated (unfrozen late) turning all of them to the geometry of a fresh
    optimizer. The oracle takes each weight in its own."""
    model, _ = trained()
    weights = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del weights["lm_head.weight"]
    weights[LATE].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train(model, optimizer, 3)
    weights[LATE].requires_grad_(True)
    assert weights[LATE] not in optimizer.state
    hypers = {n: AdamHyper(lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8, step=0 if n == LATE else 3) for n in weights}
    v = {n: optimizer.state[w]["exp_avg_sq"] for n, w in weights.items() if n != LATE}
    gradients = [
        reference.per_sequence_gradients(lambda b: token_losses(model, b), batch, weights)
        for batch in (random_batch(N, seed=1), random_batch(K_P, seed=2))
    ]
    want, _ = reference.scores(*gradients, reference.adamw_preconditioner(v, hypers))
    found = score(model, optimizer, "exact")
    assert relative(found.alignment, want) < 1e-5
    assert found.geometry == "adamw-exact + sgd (1 without optimizer state yet: blocks.1.fc1)"
    assert score(model, optimizer).geometry.startswith("adamw-separable + sgd (1 without")
