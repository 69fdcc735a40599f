"""What is read of torch optimizers in one process, and the numbers of DeepSpeed's Muon."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small_models import TinyGPT, train
from torch import Tensor, nn

from megatron_opus.backends.engines.deepspeed import muon
from megatron_opus.backends.engines.deepspeed.optimizers import parameter_groups
from megatron_opus.backends.engines.optimizer_state import optimizer_state
from megatron_opus.config import OptimizerConfig
from megatron_opus.errors import UnsupportedOptimizer
from megatron_opus.layout.model_layout import Kind, ModelLayout, ParameterLayout
from megatron_opus.types import AdamHyper, MuonHyper, SgdHyper


def newton_schulz(q: Tensor, coefficients: Any) -> Tensor:
    """The textbook iteration on the smaller side, in float64."""
    x = (q.T if q.shape[0] > q.shape[1] else q).double()
    x = x / (x.norm() + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if q.shape[0] > q.shape[1] else x


@pytest.mark.parametrize("shape", [(12, 12), (8, 40), (40, 8)], ids=str)
@pytest.mark.parametrize("method", ["gram", "standard"])
def test_muon_numbers_are_those_of_the_installed_one(shape: tuple[int, int], method: str) -> None:
    """Scale, coefficients, Nesterov flag or number of steps of another version: utilities of an update that no step
    will make. Tolerance: the arithmetic of the kernel, float32 on a CPU; `standard` iterates in bf16, whose
    2^-8 per product five steps of slope up to 3.4 carry to a few percent."""
    torch.manual_seed(0)
    module = muon.kernels()
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = module.SingleDeviceMuon([parameter], lr=0.5, momentum=0.9, ns_method=method)
    parameter.grad = torch.randn(shape)
    optimizer.step()
    state = optimizer_state(optimizer)
    (hyper,) = state.hypers([parameter])
    assert isinstance(hyper, MuonHyper)
    before = parameter.detach().clone()
    (fragment,) = state.momentum(parameter)
    gradient, m = torch.randn(shape), fragment.values.view(shape).clone()
    m_next = hyper.momentum * m + (1 - hyper.momentum) * gradient
    q = (1 - hyper.momentum) * gradient + hyper.momentum * m_next if hyper.nesterov else m_next
    expected = before - hyper.lr * hyper.scale * newton_schulz(q, hyper.coefficients).float()
    parameter.grad = gradient.clone()
    optimizer.step()
    half = module.ns_compute_dtype(method) != torch.float32
    assert (parameter - expected).abs().max() < (8e-2 if half else 1e-5) * (before - expected).abs().max()
    assert hyper.scale == pytest.approx(max(1.0, shape[0] / shape[1]) ** 0.5)


def test_muon_runs_eagerly_without_accelerator() -> None:
    """Compiled, Muon's first step on a CPU takes minutes: a quick start that looks like a hang."""
    module = muon.kernels()
    if torch.cuda.is_available():
        pytest.skip("compiled on purpose where it pays")
    from deepspeed.runtime.zero.muon import muon_optimizer

    functions = (module.muon_update, module.zeropower_via_gram_newtonschulz, muon_optimizer.muon_update)
    assert not any(hasattr(f, "_torchdynamo_orig_callable") for f in functions)


class GptNames(nn.Module):
    """The parameter names of a Megatron GPT, without its arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"linear_qkv": nn.Linear(4, 12), "norm": nn.LayerNorm(4)})
        self.embedding = nn.ModuleDict({"word": nn.Embedding(8, 4), "position_embeddings": nn.Embedding(6, 4)})
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList([block]), "final_layernorm": nn.LayerNorm(4)})
        self.output_layer = nn.Linear(4, 8, bias=False)


def test_only_block_matrices_get_muon() -> None:
    """DeepSpeed goes by names and would orthogonalise a position embedding called otherwise than it expects."""
    model = GptNames()
    kinds: dict[str, Kind] = {
        "linear_qkv.weight": "linear",
        "word.weight": "embedding",
        "position_embeddings.weight": "positions",
        "output_layer.weight": "output",
    }
    entries = tuple(
        ParameterLayout(name=n, kind=kinds.get(".".join(n.split(".")[-2:]), "norm"), shape=tuple(p.shape))
        for n, p in model.named_parameters()
    )
    by_muon = ModelLayout(parameters=entries).by_muon
    muon.tag(model, by_muon)
    tagged = {name for name, p in model.named_parameters() if p.use_muon}  # type: ignore[attr-defined]
    assert tagged == {"decoder.layers.0.linear_qkv.weight"}
    config = OptimizerConfig(name="muon", lr=1e-3, muon_lr=2e-2, weight_decay=0.1, muon_weight_decay=0.3)
    groups = parameter_groups(model, config, by_muon)
    assert [(g["use_muon"], g["initial_lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (False, 1e-3, 0.1, 3),
        (False, 1e-3, 0.0, 5),
        (True, 2e-2, 0.3, 1),
    ]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    plain = parameter_groups(model, dataclasses.replace(config, name="adamw"))
    assert [len(g["params"]) for g in plain] == [4, 5]
    assert all("use_muon" not in g for g in plain)


def hybrid(model: TinyGPT) -> tuple[torch.optim.Optimizer, nn.Parameter, nn.Parameter]:
    matrix, other = model.blocks[0].fc1.weight, model.lm_head.weight  # type: ignore[union-attr]
    rest = [p for p in model.parameters() if p is not matrix]
    groups = [
        {"params": [matrix], "use_muon": True, "lr": 0.02},
        {"params": rest, "use_muon": False, "lr": 1e-3},
    ]
    return muon.kernels().SingleDeviceMuonWithAuxAdam(groups), matrix, other  # type: ignore[return-value]


def test_each_weight_is_described_by_its_own_group() -> None:
    """One geometry for all weights of a hybrid gives half of them the preconditioner of another optimizer."""
    model = TinyGPT()
    optimizer, matrix, other = hybrid(model)
    state = optimizer_state(optimizer)
    first = state.hypers([matrix, other])
    assert [type(h) for h in first] == [MuonHyper, AdamHyper]
    assert [h.step for h in first if not isinstance(h, SgdHyper)] == [0, 0]
    assert not state.momentum(matrix)
    assert not state.second_moment(other)
    train(model, optimizer, 2)
    m, a = state.hypers([matrix, other])
    assert isinstance(m, MuonHyper)
    assert isinstance(a, AdamHyper)
    assert (m.lr, a.lr, a.step) == (0.02, 1e-3, 2)
    assert m.step > 0
    assert not state.second_moment(matrix)
    assert not state.momentum(other)
    assert state.hypers([matrix, other], "sgd") == [SgdHyper(lr=0.02), SgdHyper(lr=1e-3)]
    assert [type(h) for h in state.hypers([matrix, other], "muon")] == [MuonHyper, AdamHyper]
    with pytest.raises(UnsupportedOptimizer, match=r"updated by muon .*preconditioner.kind=adamw"):
        state.hypers([matrix], "adamw")


def test_geometries_that_have_no_state() -> None:
    """Scoring with a state that does not exist was once scoring with zeros."""
    model = TinyGPT()
    weight = model.lm_head.weight
    for optimizer, geometry in (
        (torch.optim.AdamW(model.parameters()), "muon"),
        (torch.optim.SGD(model.parameters(), lr=0.1), "adamw"),
        (torch.optim.SGD(model.parameters(), lr=0.1), "muon"),
    ):
        with pytest.raises(UnsupportedOptimizer, match=f"geometry {geometry}"):
            optimizer_state(optimizer).hypers([weight], geometry)  # type: ignore[arg-type]
    foreign = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(UnsupportedOptimizer, match="belongs to no parameter group"):
        optimizer_state(torch.optim.AdamW(model.parameters())).hypers([foreign])


def test_an_optimizer_whose_geometry_is_not_known() -> None:
    """Guards against scores in a geometry that somebody guessed: it is refused by name, and SGD's can be asked for."""
    weight = TinyGPT().lm_head.weight
    for optimizer in (
        torch.optim.Adagrad([weight], lr=0.1),
        torch.optim.Muon([weight], lr=0.1),  # its numbers are not those of DeepSpeed's
    ):
        state, name = optimizer_state(optimizer), type(optimizer).__name__
        for geometry in ("auto", "adamw", "muon"):
            with pytest.raises(UnsupportedOptimizer, match=rf"{name}, whose geometry .*preconditioner.kind=sgd"):
                state.hypers([weight], geometry)  # type: ignore[arg-type]
        assert state.hypers([weight], "sgd") == [SgdHyper(lr=0.1)]


def test_rate_of_a_new_gradient_in_sgd() -> None:
    """With Nesterov momentum the coming step holds 1 + mu times the new gradient, with dampening less than one."""
    model = TinyGPT()
    weight = model.lm_head.weight
    for options, rate in (({}, 0.1), ({"momentum": 0.5}, 0.1), ({"momentum": 0.5, "nesterov": True}, 0.15)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
        assert optimizer_state(optimizer).hypers([weight]) == [SgdHyper(lr=pytest.approx(rate))]  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, dampening=0.25)
    train(model, optimizer, 1)
    assert optimizer_state(optimizer).hypers([weight]) == [SgdHyper(lr=pytest.approx(0.075))]  # type: ignore[arg-type]
