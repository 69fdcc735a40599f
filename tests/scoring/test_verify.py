"""The first pass checks itself: what its hooks see against autograd, on models for which hooks see something else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from plain_oracle import EXACT, LR, VOCAB, alignment, found, relative, tokens
from torch import Tensor, nn
from torch.nn import functional

import megatron_opus
from megatron_opus.api import as_batch
from megatron_opus.config import ConfigError
from megatron_opus.scoring.capture import CaptureError
from megatron_opus.scoring.verify import VerificationError

N, LENGTH = 6, 12
BOTH = dataclasses.replace(EXACT, score_embedding=True, score_output_layer=True)


class Model(nn.Module):
    """Tokens, two layers and an output layer; `how` says what is done that hooks do not expect."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.wte, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB, bias=False)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.positions = torch.randn(64, 16)
        if how == "shared":
            self.b.weight = self.a.weight
        elif how == "subclass":
            self.a = Twisted(16, 16)
        elif how == "scaled":
            self.wte = Scaled(VOCAB, 16)
        elif how == "padded":
            self.wte = nn.Embedding(VOCAB, 16, padding_idx=3)
        elif how == "sparse":
            self.wte = nn.Embedding(VOCAB, 16, sparse=True)
        elif how == "batch norm":
            self.norm = nn.BatchNorm1d(16, track_running_stats=False)
        elif how == "[T, d]":
            self.c = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        how, x = self.how, self.wte(ids)
        if how == "time-major":
            x = x.transpose(0, 1)
        if how == "[T, d]":
            x = x + self.c(self.positions[: ids.shape[1]])
        x = torch.tanh(self.a(x))
        if how == "functional":
            x = x + functional.linear(x, self.a.weight)
        elif how == "batch norm":
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        elif how == "attention across the batch":
            x = x + torch.softmax(x.flatten(0, 1) @ x.flatten(0, 1).mT, -1).matmul(x.flatten(0, 1)).view_as(x)
        if how == "changed in place":
            x = self.b(x).add_(0.1).tanh_()
        elif how == "vmap":
            x = torch.vmap(lambda row: torch.tanh(self.b(row)))(x)
        else:
            x = torch.tanh(self.b(x))
        if how == "time-major":
            x = x.transpose(0, 1)
        return self.head(x)


class Twisted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.linear(x, self.weight.tanh())


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4.0


@pytest.mark.parametrize(
    ("how", "length", "says"),
    [
        ("time-major", N, r"layer a .*cannot be told apart in it \(time-major"),
        ("[T, d]", N, r"layer c"),
        ("subclass", LENGTH, r"layer a: .*Twisted computes something else"),
        ("scaled", LENGTH, r"layer wte: .*0.25 times the true gradient: Scaled"),
        ("functional", LENGTH, r"layer a: .*where no hook sees it"),
        ("batch norm", LENGTH, r"sequences mix"),
        ("attention across the batch", LENGTH, r"sequences mix"),
    ],
)
def test_a_gradient_that_hooks_do_not_see_is_an_error(how: str, length: int, says: str) -> None:
    """Guards against scores that are wrong by 0.06 to 5e6 with `finite` true. Without the check each of these models
    is scored, with a value that is not the oracle's."""
    model, candidates, proxy = Model(how), tokens(N, length), tokens(N, length, seed=4)
    config = BOTH if how == "scaled" else EXACT
    with pytest.raises(VerificationError, match=says):
        found(model, candidates, proxy, config)
    weights = {n: p for n, p in model.named_parameters() if n in ("a.weight", "b.weight", "c.weight")}
    if how == "scaled":
        weights |= {n: p for n, p in model.named_parameters() if n in ("wte.weight", "head.weight")}
    want = alignment(lambda batch: model(batch.tokens), weights, as_batch(candidates), as_batch(proxy))
    wrong = found(model, candidates, proxy, config, verify=False)
    assert wrong.finite is not None
    assert wrong.finite.all()
    assert relative(wrong.alignment, want) > 1e-3


@pytest.mark.parametrize("how", ["", "shared", "padded", "sparse", "changed in place"])
def test_what_hooks_do_see_is_right(how: str) -> None:
    """Guards against a check that refuses what is right, against modules that share one Parameter being two matrices,
    against a gradient in the row of an embedding's padding_idx, which autograd leaves at zero, and against in-place
    activations, which leave the hooks of a view behind (nn.Linear's output is one)."""
    model, candidates, proxy = Model(how), tokens(N), tokens(3, seed=4)
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    assert ("b.weight" in weights) == (how != "shared")
    scorer = megatron_opus.build_scorer(model, torch.optim.SGD(model.parameters(), lr=LR), config=BOTH)
    got = scorer(as_batch(candidates), as_batch(proxy), interaction=False)
    if how == "sparse":  # the same model for the oracle, which adds dense gradients
        model.wte.sparse = False
    want = alignment(lambda batch: model(batch.tokens), weights, as_batch(candidates), as_batch(proxy))
    assert relative(got.alignment, want) < 1e-5
    assert f"{len(weights)} matrices" in scorer.verified
    assert got.coverage == 1.0


@pytest.mark.parametrize("how", ["lazy", "meta", "vmap"])
def test_weights_without_values_and_hidden_batches_are_said(how: str) -> None:
    """Guards against an error of torch's that names neither the layer nor what to do."""
    model = Model(how)
    if how == "vmap":
        with pytest.raises(CaptureError, match=r"layer b: .*torch.func"):
            found(model, tokens(N), tokens(3))
        return
    model.b = nn.LazyLinear(16) if how == "lazy" else nn.Linear(16, 16, device="meta")
    with pytest.raises(ConfigError, match=r"b\.weight: expected a weight with values"):
        megatron_opus.build_scorer(model, torch.optim.SGD(model.a.parameters(), lr=LR))


def test_half_of_a_shared_weight_is_an_error() -> None:
    """Guards against the gradient of one use for that of the weight, where `wanted` takes one module and not the
    other."""
    with pytest.raises(VerificationError, match="layer a"):
        found(Model("shared"), tokens(N), tokens(3), wanted=lambda name: name != "b")


def test_the_comparison_is_made_once() -> None:
    """Guards against a cost in every step."""
    model = Model()
    scorer = megatron_opus.build_scorer(model, torch.optim.SGD(model.parameters(), lr=LR), config=EXACT)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    for _ in range(2):
        scorer(as_batch(tokens(N)), as_batch(tokens(3)))
    assert sizes == [3, N, 1, 3, N]


def test_a_pass_without_usable_candidates_decides_nothing() -> None:
    """Guards against a comparison of nothing that counts as passed: the next pass makes it."""
    model = Model()
    scorer = megatron_opus.build_scorer(model, torch.optim.SGD(model.parameters(), lr=LR), config=EXACT)
    batch, proxy = as_batch(tokens(N)), as_batch(tokens(3))
    empty = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    assert not scorer(empty, proxy).finite.any()
    assert scorer.verified == ""
    scorer(batch, proxy)
    assert scorer.verified


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("precision", ["model", "bf16"])
def test_rounding_is_no_difference(dtype: torch.dtype, precision: str) -> None:
    """Guards against a tolerance that low precision alone exceeds. Twelve layers, of which each rounds."""
    torch.manual_seed(0)
    body: list[nn.Module] = []
    for _ in range(12):
        body += [nn.Linear(16, 16), nn.Tanh()]
    model = nn.Sequential(nn.Embedding(VOCAB, 16), *body, nn.Linear(16, VOCAB)).to(dtype)
    config = dataclasses.replace(EXACT, score_precision=precision)
    scorer = megatron_opus.build_scorer(model, torch.optim.SGD(model.parameters(), lr=LR), config=config)
    scorer(as_batch(tokens(N)), as_batch(tokens(3)))
    assert "compared" in scorer.verified


def test_nothing_is_left_behind() -> None:
    """Guards against gradients, hooks, flags or modes that the comparison leaves, when it fails too."""
    model = Model("functional").train()
    model.b.bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    with pytest.raises(VerificationError):
        found(model, tokens(N), tokens(3))
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_an_error_names_its_own_cause() -> None:
    """Guards against one sentence about compiled modules for every cause."""

    class Quiet(Model):
        def __init__(self, cause: str) -> None:
            super().__init__()
            self.cause = cause

        def forward(self, ids: Tensor) -> Tensor:
            x = self.a(self.wte(ids))
            if self.cause == "no_grad":
                with torch.no_grad():
                    y = self.b(x)
                x = x + y
            elif self.cause == "detached":
                x = x + self.b(x).detach()
            elif self.cause == "functional":
                x = functional.linear(x, self.b.weight)
            return self.head(x)

    causes: dict[str, Any] = {
        "no_grad": r"layer b: .*torch\.no_grad",
        "detached": r"layer b: .*does not influence",
        "functional": r"layer b: .*never calls the module",
    }
    for cause, says in causes.items():
        with pytest.raises(CaptureError, match=says) as caught:
            found(Quiet(cause), tokens(N), tokens(3))
        assert "compile" not in str(caught.value)
        got = found(Quiet(cause), tokens(N), tokens(3), wanted=lambda name: name != "b")
        assert got.finite is not None
        assert got.finite.all()
