"""Megatron's own Muon: its steps against Muon written out by hand, its state, and the preconditioner read from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from distributed import DistributedPool
from gpt_runs import QWEN3, recipe, start, steps
from megatron_muon import KINDS, by_hand, installed, layout_of, muon_recipe, needs_muon
from partitions import relative

from megatron_opus.types import MuonHyper

STEPS = 3
TOLERANCE, BF16_TOLERANCE = 1e-4, 0.1
# float32 against the oracle's float64: Newton-Schulz multiplies the rounding of the smallest singular directions by up
# to 485. Measured: 2.5e-4 at most.
MULTIPLIER = 2e-3
POSITIONS = "embedding.position_embeddings.weight"


def read(kind: str, muon: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Train, then read momenta, hyper-parameters and what the preconditioner makes of a random gradient."""
    with layout_of(kind):
        return _read(kind, muon, arguments)


def _read(kind: str, muon: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    from megatron_opus.backends.model.scored_layers import megatron_layers
    from megatron_opus.scoring.collectives import Traffic
    from megatron_opus.scoring.preconditioners import Preconditioners
    from megatron_opus.selection import reference
    from megatron_opus.selection.sketch import indices

    config = muon_recipe(kind, muon, **arguments)
    engine, groups = start(config)
    taken = steps(engine, groups, 0, STEPS)
    layers = megatron_layers(engine.module, None, config.selection)
    state = engine.optimizer_state()
    hypers = dict(zip([x.name for x in layers], state.hypers([x.weight for x in layers]), strict=True))
    momenta: dict[str, torch.Tensor] = {}
    holders: dict[str, list[int]] = {}
    every = [(n, p, groups.dp) for n, p in engine.module.named_parameters() if n == POSITIONS]
    for name, weight, over in [(x.name + ".weight", x.weight, groups.state_of(x)[0]) for x in layers] + every:
        found = state.momentum(weight)
        held = [int(sum(f.values.numel() for f in found) == weight.numel())]
        holders[name] = held * (1 if over is None else dist.get_world_size(over))
        if over is not None:
            dist.all_gather_object(holders[name], held[0], group=over)
        own = torch.zeros_like(weight, dtype=torch.float32)
        if held[0]:
            own += found[0].values.view_as(own)
        if over is not None:
            dist.all_reduce(own, group=over)
        momenta[name] = own / sum(holders[name])
    pre = Preconditioners(layers, state, config.selection.preconditioner, groups, Traffic(), torch.device("cpu"))
    pre.refresh()
    worst = {}
    for i, layer in enumerate(layers):
        rows, cols = indices(layer.rows), indices(layer.cols)
        q = torch.zeros(layer.d_out, layer.d_in)
        q[rows[:, None], cols] = momenta[layer.name + ".weight"]
        h = hypers[layer.name]
        assert isinstance(h, MuonHyper)
        if groups.tp is not None and not layer.apart and not layer.replicated:
            dist.all_reduce(q, group=groups.tp)
        g = torch.randn(layer.d_out, layer.d_in, generator=torch.Generator().manual_seed(i))
        shard, of = g[rows[:, None], cols].contiguous(), (rows[:, None], cols)
        (left,) = pre.compose([(i, "rows", shard)])
        (right,) = pre.compose([(i, "cols", left.mT.contiguous())])
        apply = reference.muon_preconditioner({"w": q if h.whole else q[of]}, {"w": h})
        want = apply({"w": (g if h.whole else shard).double()})["w"]
        worst[layer.name] = relative(pre.kappa(i) * right.mT.double(), want[of] if h.whole else want)
    return {"steps": taken, "momenta": momenta, "holders": holders, "hypers": hypers, "worst": worst}


@pytest.fixture(scope="module")
def alone() -> Any:
    """Muon written out by hand, one process."""
    pool = DistributedPool(1)
    found: dict[str, Any] = {}

    def run(**muon: Any) -> Any:
        key = repr(sorted(muon.items()))
        if key not in found:
            found[key] = pool.run(by_hand, muon_recipe("plain", muon), STEPS)[0]
        return found[key]

    yield run
    pool.close()


def check_steps(results: list[dict[str, Any]], want: dict[str, Any], tolerance: float) -> None:
    for result in results:
        for (loss, norm), (want_loss, want_norm) in zip(result["steps"], want["steps"], strict=True):
            assert loss == pytest.approx(want_loss, rel=tolerance)
            assert norm == pytest.approx(want_norm, rel=10 * tolerance)
        assert [h.lr for h in result["hypers"].values()] == pytest.approx([want["lr"]] * len(result["hypers"]))
        assert {h.step for h in result["hypers"].values()} == {STEPS}


@needs_muon
@pytest.mark.parametrize("muon", [{}, {"muon_split_qkv": False}, {"muon_nesterov": True}], ids=str)
def test_steps_and_momenta_are_those_written_out_by_hand(world2: Any, alone: Any, muon: dict[str, Any]) -> None:
    """Guards against a rate, a decay, a scale or a key that Megatron's optimizer never sees, and against position
    embeddings given to AdamW."""
    want = alone(**muon)
    results = world2.run(read, "plain", muon, {})
    check_steps(results, want, 2e-5)
    for result in results:
        for name, momentum in result["momenta"].items():
            assert relative(momentum, want["momenta"][name]) < TOLERANCE, name
        assert POSITIONS in result["momenta"]
        assert {h.nesterov for h in result["hypers"].values()} == {bool(muon.get("muon_nesterov"))}


@needs_muon
@pytest.mark.parametrize("mode", ["duplicated", "distributed"])
@pytest.mark.parametrize("sp", [False, True])
def test_the_whole_matrix_over_tensor_parallel_ranks(world2: Any, alone: Any, mode: str, sp: bool) -> None:
    """Guards against a multiplier of the shard where Megatron takes the whole matrix, and against replicated position
    embeddings that are taken for shards."""
    results = world2.run(read, "plain", {"muon_tp_mode": mode}, {"tp": 2, "sp": sp})
    check_steps(results, alone(), 2e-5)
    for result in results:
        assert all(h.whole for h in result["hypers"].values())
        assert max(result["worst"].values()) < MULTIPLIER, result["worst"]


@needs_muon
def test_shards_one_by_one_are_another_optimizer(world2: Any, alone: Any) -> None:
    """Guards against the test above being blind: blockwise, a run at TP 2 takes other steps, and its shards have
    multipliers of their own."""
    for result in world2.run(read, "plain", {}, {"tp": 2}):
        assert not any(h.whole for h in result["hypers"].values())
        assert max(result["worst"].values()) < MULTIPLIER, result["worst"]
        assert result["steps"][2][0] != pytest.approx(alone()["steps"][2][0], rel=2e-5)


@needs_muon
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("muon", [{}, {"muon_split_qkv": False}], ids=str)
def test_the_preconditioner_is_that_of_the_state(world2: Any, alone: Any, kind: str, muon: dict[str, Any]) -> None:
    """Guards against momentum read on ranks that hold none of it, added up over ranks that all hold it, a float32 copy
    of a bf16 weight that is not known to be split, and a layout whose parameters are not found."""
    bf16 = kind != "plain"
    results = world2.run(read, kind, muon, {})
    want = alone(**muon)
    check_steps(results, want, 1e-3 if bf16 else 2e-5)
    for result in results:
        assert max(result["worst"].values()) < MULTIPLIER, result["worst"]
        for name, momentum in result["momenta"].items():
            assert relative(momentum, want["momenta"][name]) < (BF16_TOLERANCE if bf16 else TOLERANCE), name
        splits = {bool(h.split) for name, h in result["hypers"].items() if "linear_qkv" in name}
        assert splits == {muon.get("muon_split_qkv", True)}
        held = {sum(x) for x in result["holders"].values()}
        assert held == ({1} if kind.startswith("layer-wise") else {2})


@needs_muon
@pytest.mark.parametrize("mode", ["blockwise", "duplicated"])
@pytest.mark.parametrize("kind", ["plain", "layer-wise"])
def test_tensor_and_data_parallel_together(world4: Any, kind: str, mode: str) -> None:
    """Guards against a momentum gathered over the wrong group: TP 2 x DP 2, sequence parallel."""
    for result in world4.run(read, kind, {"muon_tp_mode": mode}, {"tp": 2, "sp": True}):
        assert max(result["worst"].values()) < MULTIPLIER, result["worst"]


EXPERTS = dataclasses.replace(QWEN3, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24)


@needs_muon
@pytest.mark.parametrize("arguments", [{}, {"tp": 2, "sp": True}], ids=["EP 2 x DP 2", "TP 2 x EP 2 x DP 2"])
@pytest.mark.parametrize("kind", ["plain", "layer-wise", "layer-wise, by size"])
def test_experts_on_several_ranks(world4: Any, kind: str, arguments: dict[str, Any]) -> None:
    """Guards against momenta of experts looked for on the data-parallel ranks, which hold other experts, and against an
    expert that is taken for a tensor-parallel shard."""
    parallel = KINDS[kind]["parallel"] | {"expert_model_parallel_size": 2}
    more = {"model": EXPERTS, "parallel": parallel, **arguments}
    for result in world4.run(read, kind, {"muon_tp_mode": "duplicated", "muon_split_qkv": False}, more):
        experts = [name for name in result["worst"] if ".local_experts." in name]
        assert len(experts) == 2 * 2 * 2  # blocks, experts of this rank, matrices
        assert max(result["worst"].values()) < MULTIPLIER, result["worst"]
        for name, held in result["holders"].items():
            assert sum(held) == (len(held) if kind == "plain" else 1), name
        assert not any(result["hypers"][name].whole for name in experts)


@needs_muon
@pytest.mark.parametrize("steps", [1, 5, 9])
def test_coefficients_by_name_are_those_of_the_optimizer(steps: int) -> None:
    """Guards against coefficients that begin anew where the optimizer repeats the last ones."""
    from emerging_optimizers.orthogonalized_optimizers import muon_utils

    from megatron_opus.backends.model import releases

    q = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("highest")
    for name in ("simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"):
        x = q.double() / q.double().norm()
        for a, b, c in releases.muon_coefficients(name, steps):
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        assert relative(muon_utils.newton_schulz(q, steps, name).double(), x) < 1e-3, (name, steps)


def read_unknown(name: str) -> dict[str, Any]:
    """Let Megatron build another of its optimizers, train a step, and read it."""
    from unittest import mock

    from megatron_opus.backends.engines.megatron import ddp
    from megatron_opus.backends.model.scored_layers import megatron_layers
    from megatron_opus.errors import UnsupportedOptimizer

    own = ddp._optimizer_config
    config = muon_recipe("plain")
    with mock.patch.object(ddp, "_optimizer_config", lambda c: dataclasses.replace(own(c), optimizer=name)):
        engine, groups = start(config)
    if name != "adaptive_muon":  # which megatron-core 0.19.2 builds, and cannot step
        steps(engine, groups, 0, 1)
    state = engine.optimizer_state()
    weights = [x.weight for x in megatron_layers(engine.module, None, config.selection)]
    try:
        state.hypers(weights)
    except UnsupportedOptimizer as error:
        return {"said": str(error), "sgd": state.hypers(weights, "sgd")}
    return {}


@needs_muon
@pytest.mark.parametrize("name", ["lion", "soap", "adaptive_muon"])
def test_an_optimizer_of_megatron_whose_geometry_is_not_known(world2: Any, name: str) -> None:
    """Guards against a live run with Lion or SOAP scored in the geometry of another optimizer: refused by name."""
    for found in world2.run(read_unknown, name):
        assert name.replace("_", "") in found["said"].lower()
        assert "selection.preconditioner.kind=sgd" in found["said"]
        assert {type(h).__name__ for h in found["sgd"]} == {"SgdHyper"}


def refused() -> str:
    from megatron_opus.errors import Refusal

    try:
        start(recipe(optimizer="muon", parallel={"engine": "megatron", "use_distributed_optimizer": False}))
    except Refusal as error:
        return str(error)
    return ""


@pytest.mark.skipif(installed(), reason="this megatron-core has Muon")
def test_a_release_without_muon_says_which_one_has_it(world2: Any) -> None:
    """Guards against an import error, or another optimizer taken silently."""
    for said in world2.run(refused):
        assert "its Muon" in said
        assert "0.19.2 on Python 3.12" in said
