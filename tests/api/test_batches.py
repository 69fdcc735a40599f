"""Every field of a `Batch` is used by `megatron_opus.score`, or refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from plain_oracle import EXACT, VOCAB, alignment, found, relative, tokens
from torch import Tensor, nn

import megatron_opus
from megatron_opus.api import as_batch
from megatron_opus.config import ConfigError, PreconditionerConfig, SelectionConfig
from megatron_opus.types import Batch

N, LENGTH = 5, 12


class Positions(nn.Module):
    """Learned positions: no doubt about what position_ids mean. `takes` says whether forward has the argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(VOCAB, 16), nn.Embedding(64, 16)
        self.a, self.head = nn.Linear(16, 16), nn.Linear(16, VOCAB)

    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        positions = torch.arange(ids.shape[1]) if position_ids is None else position_ids
        return self.head(torch.tanh(self.a(self.wte(ids) + self.wpe(positions))))


class Without(Positions):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids)


def oracle(model: nn.Module, candidates: Batch, proxy: Batch) -> Tensor:
    return alignment(lambda b: model(b.tokens, b.position_ids), {"a": model.a.weight}, candidates, proxy)


def test_positions_are_used_or_refused() -> None:
    """Guards against packed documents that are read as one: positions dropped without a word."""
    model, proxy = Positions(), as_batch(tokens(3, seed=4))
    restart = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(N, LENGTH)
    batch = dataclasses.replace(as_batch(tokens(N)), position_ids=restart)
    assert relative(found(model, batch, proxy).alignment, oracle(model, batch, proxy)) < 1e-5
    with pytest.raises(ConfigError, match=r"position_ids: .*Without\.forward takes no position_ids"):
        found(Without(), batch, proxy)


def test_windows_keep_their_positions() -> None:
    """Guards against a second window that is read as if it were the first. The truth: each window by itself, at its
    own positions, the mean over the tokens of both."""
    model, candidates, proxy = Positions(), as_batch(tokens(N)), as_batch(tokens(3, seed=4))
    config = dataclasses.replace(EXACT, score_length=6, score_windows=2)

    def gradient(batch: Batch) -> Tensor:
        total = torch.zeros_like(model.a.weight)
        for start in (0, 6):
            one = batch.window(6, start)
            losses = nn.functional.cross_entropy(model(one.tokens, one.position_ids).mT, one.labels, reduction="sum")
            total += torch.autograd.grad(losses / LENGTH, model.a.weight)[0]
        return total.double().flatten()

    target = torch.stack([gradient(proxy.rows(i, i + 1)) for i in range(3)]).mean(0)
    want = 0.1 * torch.stack([gradient(candidates.rows(i, i + 1)) for i in range(N)]) @ target
    assert relative(found(model, candidates, proxy, config).alignment, want) < 1e-5
    with pytest.raises(ConfigError, match="windows further on"):
        found(Without(), candidates, proxy, config)


@pytest.mark.parametrize("own_loss", [False, True])
def test_ignored_labels_do_not_count(own_loss: bool) -> None:
    """Guards against tokens with label -100 that have loss 0 and count in the mean: twice too small a gradient."""
    model, proxy = Positions(), as_batch(tokens(3, seed=4))
    batch = as_batch(tokens(N))
    labels = batch.labels.clone()
    labels[::2, 5:] = -100
    batch = dataclasses.replace(batch, labels=labels)
    truth = dataclasses.replace(batch, loss_mask=(labels != -100).float())

    def losses(m: nn.Module, b: Batch) -> Tensor:
        return nn.functional.cross_entropy(m(b.tokens).mT, b.labels, reduction="none")

    got = found(model, batch, proxy, **({"token_losses": losses} if own_loss else {}))
    assert relative(got.alignment, oracle(model, truth, proxy)) < 1e-5


def test_candidates_and_proxy_have_lengths_of_their_own() -> None:
    """Guards against a proxy that is cut to the candidates' windows, or read past its end."""
    model, config = Positions(), dataclasses.replace(EXACT, score_length=10)
    for sizes in ((12, 7), (7, 12), (12, 12)):
        candidates, proxy = as_batch(tokens(N, sizes[0])), as_batch(tokens(3, sizes[1], seed=4))
        want = oracle(model, *(x.window(min(10, size)) for x, size in zip((candidates, proxy), sizes, strict=True)))
        assert relative(found(model, candidates, proxy, config).alignment, want) < 1e-5


def test_fields_that_do_not_fit_are_refused() -> None:
    """Guards against broadcasting: one mask for all sequences, or labels that are one shorter."""
    model, batch, proxy = Positions(), as_batch(tokens(N)), as_batch(tokens(3))
    for field, value in (
        ("loss_mask", torch.ones(1, LENGTH)),
        ("labels", batch.labels[:, 1:]),
        ("position_ids", torch.arange(LENGTH)),
        ("attention_mask", torch.ones(N)),
    ):
        with pytest.raises(ConfigError, match=rf"candidates\.{field}: expected the shape of the tokens, \[5, 12\]"):
            found(model, dataclasses.replace(batch, **{field: value}), proxy)
    with pytest.raises(ConfigError, match=r"proxy\.tokens: expected ids"):
        found(model, batch, proxy.rows(0, 0))
    with pytest.raises(ConfigError, match="document_ids"):
        found(model, dataclasses.replace(batch, document_ids=torch.zeros(N, LENGTH, dtype=torch.int32)), proxy)
    with pytest.raises(ConfigError, match=r"attention_mask: .*takes no attention_mask"):
        found(model, dataclasses.replace(batch, attention_mask=torch.ones(N, LENGTH)), proxy)


def test_a_loss_that_does_not_count_may_be_nan() -> None:
    """Guards against 0 * NaN: a token outside of the mask makes its sequence useless."""
    model, proxy = Positions(), as_batch(tokens(3, seed=4))
    batch = as_batch(tokens(N))
    mask = batch.loss_mask.clone()
    mask[:, 0] = 0
    batch = dataclasses.replace(batch, loss_mask=mask)

    def losses(m: nn.Module, b: Batch) -> Tensor:
        value = nn.functional.cross_entropy(m(b.tokens).mT, b.labels, reduction="none")
        return torch.where(b.loss_mask != 0, value, torch.nan)

    assert relative(found(model, batch, proxy, token_losses=losses).alignment, oracle(model, batch, proxy)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_type(dtype: torch.dtype) -> None:
    """Guards against an error of torch's embedding or cross entropy for ids as files hold them."""
    model, candidates, proxy = Positions(), tokens(N), tokens(3)
    want = found(model, candidates, proxy).alignment
    assert torch.equal(found(model, candidates.to(dtype), proxy.to(dtype)).alignment, want)
    batch = as_batch(candidates)
    batch = dataclasses.replace(batch, tokens=batch.tokens.to(dtype), labels=batch.labels.to(dtype))
    assert torch.equal(found(model, batch, proxy).alignment, want)


def test_positions_beyond_the_models_are_refused() -> None:
    """Guards against an IndexError out of the depth of the model that names no field."""
    with pytest.raises(ConfigError, match=r"positions inside of the model's, got .*position_ids 0 to 79"):
        found(Positions(), tokens(N, 80), tokens(3))


@pytest.mark.parametrize("loss", [None, (torch.zeros(3, LENGTH),), [0.0]])
def test_losses_that_are_no_tensor_are_refused(loss: Any) -> None:
    """Guards against an AttributeError where `token_losses` forgets its return, or gives a model's whole output."""
    with pytest.raises(ConfigError, match=rf"token losses: expected a tensor .* got {type(loss).__name__}"):
        found(Positions(), tokens(N), tokens(3), token_losses=lambda model, batch: loss)


@pytest.mark.parametrize("how", ["tuple", "last", "dict"])
def test_outputs_of_other_shapes(how: str) -> None:
    """Guards against errors out of the depth of a library where the model's output is not [B, T, V]."""

    class Output(Positions):
        def forward(self, ids: Tensor) -> object:  # type: ignore[override]
            logits = super().forward(ids)
            return {"tuple": (logits, None), "last": logits[:, -1:], "dict": {"other": logits}}[how]

    model, candidates, proxy = Output(), as_batch(tokens(N)), as_batch(tokens(3, seed=4))
    if how == "tuple":
        want = oracle(Positions(), candidates, proxy)
        assert relative(found(model, candidates, proxy).alignment, want) < 1e-5
    else:
        with pytest.raises(ConfigError, match=r"expected logits \[3, 12, vocabulary\], got"):
            found(model, candidates, proxy)


def test_inference_mode_is_refused_and_no_grad_is_not() -> None:
    """Guards against an error that speaks of inference tensors somewhere in the model."""
    model, candidates, proxy = Positions(), tokens(N), tokens(3)
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        found(model, candidates, proxy)
    with torch.no_grad():
        assert found(model, candidates, proxy).finite.all()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"score_length": 0}, "score_length"),
        ({"score_length": "512"}, "score_length"),
        ({"score_micro_batch_size": -1}, "score_micro_batch_size"),
        ({"preconditioner": PreconditionerConfig(form="exact")}, "operator"),
    ],
)
def test_configurations_made_in_python_are_checked(given: dict[str, Any], says: str) -> None:
    """Guards against settings that YAML would refuse and that end in an error of torch, or in nothing at all."""
    with pytest.raises(ConfigError, match=says):
        SelectionConfig(**given)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: None, "got NoneType"),
        (lambda t: t.tolist(), "got list"),
        (lambda t: t.numpy(), "got ndarray"),
        (lambda t: {"input_ids": t}, "got dict"),
        (lambda t: torch.nested.nested_tensor([t[0], t[1][:5]]), "nested tensor; pad it"),
        (lambda t: t.to_sparse(), r"\.to_dense\(\)"),
        (lambda t: t.to("meta"), "meta device"),
        (lambda t: t > 3, "torch.bool"),
        (lambda t: t + VOCAB, f"ids below {VOCAB}"),
        (lambda t: t - VOCAB, "ids from 0 on"),
    ],
)
def test_what_are_no_token_ids_is_refused(change: Any, says: str) -> None:
    """Guards against an error out of torch's kernels, which on a GPU takes the whole process with it."""
    model, good = Positions(), tokens(N, LENGTH, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for candidates, proxy in ((change(good), good), (good, change(good))):
        with pytest.raises(ConfigError, match=says):
            megatron_opus.score(model, candidates, proxy, optimizer)


@pytest.mark.parametrize(
    ("field", "change", "says"),
    [
        ("tokens", lambda t: t > 3, r"candidates\.tokens: expected ids .* got torch.bool"),
        ("labels", lambda t: t.float(), r"candidates\.labels: expected integers, got torch.float32"),
        ("labels", lambda t: t * 0 - 1, "labels of -100 where nothing is predicted, found -1"),
        ("labels", lambda t: t + VOCAB, rf"candidates\.labels: expected ids below {VOCAB}"),
        ("loss_mask", lambda t: -t, r"candidates\.loss_mask: expected weights of at least 0, found -1"),
        ("loss_mask", lambda t: None, r"candidates\.loss_mask: expected a tensor, got NoneType"),
        ("position_ids", lambda t: t.tolist(), r"candidates\.position_ids: expected a tensor, got list"),
        ("attention_mask", lambda t: [1], r"candidates\.attention_mask: expected a tensor, got list"),
    ],
)
def test_fields_of_another_kind_are_refused(field: str, change: Any, says: str) -> None:
    """Guards against a mask that turns the sign round, and against errors that name no field."""
    model, batch = Positions(), as_batch(tokens(N, LENGTH, seed=1))
    batch = dataclasses.replace(batch, **{field: change(getattr(batch, field))})
    with pytest.raises(ConfigError, match=says):
        megatron_opus.score(model, batch, tokens(N, LENGTH, seed=2), torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"config": {}}, "config: expected a SelectionConfig"),
        ({"groups": 3}, "groups: expected a Groups"),
        ({"layout": 3}, "layout: expected a ModelLayout"),
        ({"token_losses": 3}, "token_losses: expected a function"),
        ({"wanted": "a"}, "wanted: expected a function"),
        ({"device": "nowhere"}, "device: expected one that torch has here"),
        ({"device": 3.5}, "device: expected one that torch has here"),
        ({"token_losses": lambda model, batch: None}, "token losses: expected a tensor"),
    ],
)
def test_options_of_another_kind_are_refused(options: dict[str, Any], says: str) -> None:
    """Guards against an AttributeError from the inside, and against {} taken for the defaults."""
    model, ids = Positions(), tokens(N, LENGTH, seed=1)
    with pytest.raises(ConfigError, match=says):
        megatron_opus.score(model, ids, ids, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: None, "expected a torch.nn.Module, got None"),
        (lambda: Positions, "expected a torch.nn.Module, got <class"),
        (nn.Sequential, "no layer to score"),
        (lambda: Positions().to("meta"), "meta device"),
        (lambda: nn.Sequential(nn.Embedding(VOCAB, 8), nn.LazyLinear(VOCAB)), "lazy module that was never called"),
        (lambda: nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, 8, dtype=torch.complex64)), "real numbers"),
    ],
)
def test_what_is_no_model_with_values_is_refused(make: Any, says: str) -> None:
    """Guards against StopIteration and errors of torch's kernels for models that cannot be scored."""
    ids, optimizer = tokens(N, LENGTH, seed=1), torch.optim.SGD(Positions().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=says):
        megatron_opus.score(make(), ids, ids, optimizer)
