"""Scores of mixtures of experts: against autograd, and over ranks against one process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import te_stand_in
import torch
from distributed import DistributedPool
from gpt_runs import LENGTH, QWEN3, batch_of_step, newton_schulz, recipe, share_of_rank, start
from megatron_muon import needs_muon
from partitions import relative
from small_models import random_batch

from megatron_opus.config import (
    ControllerConfig,
    OptimizerConfig,
    PreconditionerConfig,
    RunConfig,
    SelectionConfig,
    SketchConfig,
)
from megatron_opus.layout.model_layout import recipe_layout

N, K_P, STEPS = 8, 4, 2
# Newton-Schulz multiplies the rounding of the smallest singular directions: as in test_megatron_layouts.py
NEWTON_SCHULZ = 1e-3
MUON = {
    "name": "muon",
    "muon_lr": 1e-3,
    "muon_fp32_matmul_prec": "highest",
    "muon_tp_mode": "duplicated",
    "muon_split_qkv": False,
}
TOLERANCE = 1e-5  # as in test_sharded.py; float32 sums in another order, through two steps of AdamW
EXPERTS = dataclasses.replace(QWEN3, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=24)
MODELS = {
    "experts": EXPERTS,
    "shared": dataclasses.replace(EXPERTS, moe_shared_expert_intermediate_size=16, moe_shared_expert_gate=True),
    "balanced": dataclasses.replace(EXPERTS, moe_aux_loss_coeff=1.0),
}


def selection(alignment: str = "one_sided", scope: str = "layer", operator: str = "two_sided", **more: Any) -> Any:
    sketch = SketchConfig(operator=operator, dim=256, alignment=alignment, one_sided_dim=12, scope=scope)
    return SelectionConfig(
        sketch=sketch, preconditioner=PreconditionerConfig(form=more.pop("form", "separable")), **more
    )


ESTIMATORS = {
    "one_sided": selection(),
    "one_sided, one scope": selection(scope="model"),
    "features": selection("features"),
    "features, one scope": selection("features", "model"),
    "direction": selection("direction"),
    "materialise, exact": selection("features", operator="materialise", form="exact"),
    "two windows": selection(score_windows=2, score_length=LENGTH // 2),
    "halves": selection(controller=ControllerConfig(enabled=True), proxy_batch_size=K_P),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 2": {},
    "EP 2": {"ep": 2},
    "EP 2, replicated optimizer": {"ep": 2, "parallel": {"use_distributed_optimizer": False}},
    "EP 2, all to all": {"ep": 2, "parallel": {"moe_token_dispatcher_type": "alltoall"}},
    "EP 2 x DP 2": {"ep": 2, "world": 4},
    "EP 4": {"ep": 4, "world": 4},
    "TP 2 x EP 2, SP": {"tp": 2, "sp": True, "ep": 2},
    "TP 2 x EP 2 x DP 2, SP": {"tp": 2, "sp": True, "ep": 2, "world": 4},
    "TP 2 x EP 4, SP": {"tp": 2, "sp": True, "ep": 4, "world": 4},
    "PP 2 x EP 2": {"pp": 2, "ep": 2, "world": 4},
    "DP 2, grouped": {"grouped": True},
    "EP 2, grouped": {"ep": 2, "grouped": True},
    "EP 2, all to all, grouped": {"ep": 2, "grouped": True, "parallel": {"moe_token_dispatcher_type": "alltoall"}},
}


def run_config(
    estimator: str, *, model: str, tp: int = 1, sp: bool = False, ep: int = 1, pp: int = 1, **more: Any
) -> RunConfig:
    parallel = {"engine": "megatron", "expert_model_parallel_size": ep, "pipeline_model_parallel_size": pp}
    parallel |= more.get("parallel", {})
    config = recipe(tp=tp, sp=sp, model=MODELS[model], micro_batch_size=1, parallel=parallel)
    chosen = dataclasses.replace(ESTIMATORS[estimator], score_micro_batch_size=more.get("size", 2))
    if chosen.score_windows == 1:
        chosen = dataclasses.replace(chosen, score_length=LENGTH)
    # eps: some gradients are 0 but for rounding, and the first steps of AdamW divide them by their own size
    optimizer = OptimizerConfig(lr=3e-3, adam_eps=1e-5, lr_warmup_steps=2, **more.get("optimizer", {}))
    return dataclasses.replace(config, selection=chosen, optimizer=optimizer)


def scorer_of(engine: Any, groups: Any, config: RunConfig) -> Any:
    from megatron_opus.backends.model.scored_layers import megatron_layers
    from megatron_opus.scoring.scoring_pass import ScoringPass
    from megatron_opus.scoring.verify import gradient_check

    layers = megatron_layers(engine.module, recipe_layout(config), config.selection)
    verify, _ = gradient_check(engine.runner())
    scorer = ScoringPass(
        engine.runner(), layers, engine.optimizer_state(), config.selection,
        groups=groups, device=engine.device, verify=verify,
    )  # fmt: skip
    candidates, proxy = random_batch(N, LENGTH, seed=1, masked=True), random_batch(K_P, LENGTH, seed=2)
    n, p, r = N // groups.dp_size, K_P // groups.dp_size, groups.dp_rank
    return lambda: scorer(candidates.rows(r * n, (r + 1) * n), proxy.rows(r * p, (r + 1) * p))


def with_muon(layout: dict[str, Any]) -> dict[str, Any]:
    return layout | {"optimizer": MUON, "parallel": {"use_distributed_optimizer": False}}


def train_and_score(estimator: str, layout: dict[str, Any], *, score: str = "last") -> dict[str, Any]:
    """Train two steps; score `never`, after the `last` step, or before `every` one and after the last."""
    from megatron_opus.backends.model.stages import named_parameters

    config = run_config(estimator, **layout)
    engine, groups = start(config)
    if layout.get("grouped"):
        te_stand_in.group_experts(engine.module)
    scored = scorer_of(engine, groups, config)
    steps = []
    for step in range(STEPS):
        if score == "every":
            scored()
        result = engine.train_step(share_of_rank(batch_of_step(step), groups, 1), per_sequence=True)
        steps.append((result.loss, result.grad_norm, result.sequence_loss.tolist()))
    found: dict[str, Any] = {"steps": steps}
    if score != "never":
        signals = scored()
        found |= {"align": signals.alignment, "inter": signals.interaction, "loss": signals.loss}
        found["halves"] = signals.halves
        found["load"] = signals.expert_load
        found["geometry"] = signals.geometry
    found["weights"] = {name: p.detach().clone() for name, p in named_parameters(engine.module)}
    found["evaluation"] = engine.evaluate({"a": batch_of_step(50, 5), "b": batch_of_step(51, 3)}, 2)
    return found


@pytest.fixture(scope="module")
def world1() -> Iterator[DistributedPool]:
    pool = DistributedPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def alone(world1: DistributedPool) -> Any:
    @functools.cache
    def run(estimator: str, model: str, muon: bool = False) -> Any:
        return world1.run(train_and_score, estimator, {"model": model} | (with_muon({}) if muon else {}))[0]

    return run


def gradients_of_one_process(model: str) -> dict[str, tuple[Any, Any]]:
    """What the hooks see of every matrix of every sequence, and autograd's own gradients."""
    from megatron_opus.backends.engines.base import WholeModelRunner
    from megatron_opus.backends.model.gpt import forward_loss
    from megatron_opus.backends.model.scored_layers import megatron_layers
    from megatron_opus.scoring.capture import Capture
    from megatron_opus.scoring.collectives import Traffic
    from megatron_opus.scoring.microbatch import CapturedMicrobatch
    from megatron_opus.scoring.projections import Part
    from megatron_opus.scoring.sums import Reading, Sums
    from megatron_opus.scoring.undisturbed import undisturbed
    from megatron_opus.selection import reference

    config = run_config("one_sided", model=model)
    engine, groups = start(config)
    module, batch = engine.module, random_batch(N, LENGTH, seed=1, masked=True)
    layers = megatron_layers(module, recipe_layout(config), config.selection)
    weights = {x.name: x.weight for x in layers}
    with undisturbed([module]):
        for weight in weights.values():
            weight.requires_grad_(True)
        true = reference.per_sequence_gradients(lambda b: forward_loss(module, b), batch, weights)
    runner = WholeModelRunner(module, forward_loss, engine.device)
    seen: dict[str, list[Any]] = {x.name: [] for x in layers}
    for z in range(N):
        sums = Sums([0] * len(layers), list(range(len(layers))), N, "layer", engine.device)
        part = [Part(kept=None, projected=None, probe=True)]  # the gradient of sequence z, in the whole micro-batch
        reading = Reading(parts=[part] * len(layers), candidate=True, shape=(N, LENGTH), probed=z)
        capture = Capture(layers, range(len(layers)), reading, None, sums, groups, Traffic())  # type: ignore[arg-type]
        ones = torch.ones(N)
        micro = CapturedMicrobatch(
            batch, capture, batch.loss_mask.sum(1), ones, torch.zeros(N), config.selection, engine.device
        )
        with undisturbed([module]):
            runner.backward([micro])
        capture.check()
        for i, layer in enumerate(layers):
            seen[layer.name].append(sums.probes.get(i, torch.zeros_like(layer.weight)))
    return {name: (torch.stack(seen[name]), torch.stack([g[name] for g in true])) for name in weights}


@pytest.mark.parametrize("model", ["experts", "shared"])
def test_every_matrix_has_its_own_gradients(world1: Any, model: str) -> None:
    """Guards against rows of an expert that are given to other sequences, an expert without tokens that is refused,
    and routers and gates whose logits nobody sees."""
    found = world1.run(gradients_of_one_process, model)[0]
    assert len([name for name in found if ".local_experts." in name]) == 2 * 8 * 2
    assert len([name for name in found if name.endswith(".router")]) == 2
    assert len([name for name in found if name.endswith("gate_weight")]) == (2 if model == "shared" else 0)
    without = 0
    for name, (seen, true) in found.items():
        assert torch.isfinite(seen).all()
        # the largest gradient of a kind, beside which rounding is measured
        assert float((seen.double() - true).norm()) <= 5e-7 * float(true.norm()) + 1e-9, name
        without += int((true.flatten(1).norm(dim=1) == 0).sum())
    assert without > 0  # some expert got no token of some sequence


def check(pool: Any, alone: Any, table: Any, layout: str, estimator: str, model: str, muon: bool = False) -> None:
    arguments = {k: v for k, v in LAYOUTS[layout].items() if k != "world"} | {"model": model}
    arguments, optimizer = (with_muon(arguments), "Muon") if muon else (arguments, "AdamW")
    results, truth = pool.run(train_and_score, estimator, arguments), alone(estimator, model, muon)
    tolerance = NEWTON_SCHULZ if muon else TOLERANCE
    for found in results:
        table.check(
            found, truth["align"], truth["inter"], against="one process", estimator=estimator,
            layout=f"Qwen3-MoE ({model}), Megatron's engine, {layout}, {optimizer}", tolerance=tolerance,
        )  # fmt: skip
        torch.testing.assert_close(found["loss"], truth["loss"], rtol=tolerance, atol=0)
        assert found["geometry"] == truth["geometry"]
        assert torch.equal(found["load"], truth["load"])
        layers, experts = 2, 8
        assert found["load"].shape == (N, layers, experts)
        assert (found["load"].sum(2) == 2 * LENGTH).all()  # every scored token takes two
        for (loss, norm, own), (want, want_norm, want_own) in zip(found["steps"], truth["steps"], strict=True):
            assert (loss, norm) == pytest.approx((want, want_norm), rel=2e-5)
            assert own == pytest.approx(want_own, rel=2e-5)
        assert found["evaluation"] == pytest.approx(truth["evaluation"], rel=2e-5)
        assert torch.equal(found["align"], results[0]["align"])  # to the last bit: all ranks draw from them
        assert torch.equal(found["inter"], results[0]["inter"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_one_process(
    world2: Any, world4: Any, alone: Any, partition_table: Any, layout: str
) -> None:
    """Guards against sums over the wrong ranks, sequences of other ranks counted as this one's, experts under their
    local numbers, and optimizer state that is read over the data-parallel group instead of the experts' own."""
    pool = world4 if LAYOUTS[layout].get("world") == 4 else world2
    check(pool, alone, partition_table, layout, "one_sided", "shared")


@needs_muon
@pytest.mark.parametrize("layout", ["DP 2", "EP 2", "EP 2 x DP 2", "TP 2 x EP 2, SP", "TP 2 x EP 2 x DP 2, SP"])
def test_scores_under_muon(world2: Any, world4: Any, alone: Any, partition_table: Any, layout: str) -> None:
    """Guards against the momentum of an expert joined over tensor-parallel ranks, which hold other experts, or read
    over the data-parallel group."""
    pool = world4 if LAYOUTS[layout].get("world") == 4 else world2
    check(pool, alone, partition_table, layout, "one_sided", "shared", muon=True)
    assert "muon" in alone("one_sided", "shared", True)["geometry"]


def deepspeed_muon(zero: int) -> Any:
    """Signals after two steps with DeepSpeed's Muon; its Newton-Schulz steps in float32."""
    newton_schulz(torch.float32)
    config = recipe(model=MODELS["shared"], optimizer="muon", zero=zero, micro_batch_size=1)
    config = dataclasses.replace(config, selection=dataclasses.replace(ESTIMATORS["one_sided"], score_length=LENGTH))
    engine, groups = start(config)
    scored = scorer_of(engine, groups, config)
    for step in range(STEPS):
        engine.train_step(share_of_rank(batch_of_step(step), groups, 1))
    signals = scored()
    return {"align": signals.alignment, "inter": signals.interaction, "geometry": signals.geometry}


@pytest.mark.parametrize("zero", [1, 3])
def test_deepspeed_muon(world1: Any, world2: Any, partition_table: Any, zero: int) -> None:
    """Guards against experts that DeepSpeed's Muon takes in another way than the other matrices."""
    truth = world1.run(deepspeed_muon, 0)[0]
    for found in world2.run(deepspeed_muon, zero):
        partition_table.check(
            found, truth["align"], truth["inter"], against="one process", estimator="one_sided",
            layout=f"Qwen3-MoE (shared), DeepSpeed's engine, DP 2, ZeRO {zero}, Muon", tolerance=NEWTON_SCHULZ,
        )  # fmt: skip
        assert found["geometry"] == truth["geometry"] == "muon + adamw-separable"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_over_expert_ranks(world2: Any, alone: Any, partition_table: Any, estimator: str) -> None:
    """Guards against an estimator whose rows of other ranks' sequences, or whose shared slot, are lost."""
    check(world2, alone, partition_table, "EP 2", estimator, "experts")


def test_halves_of_the_proxy_over_expert_ranks(world2: Any) -> None:
    """Guards against halves of an expert whose tokens come from both ranks, and so from both halves' sequences.

    Two data-parallel ranks cut the proxy into the same halves whether they share the experts or not."""
    whole, shared = (world2.run(train_and_score, "halves", {"model": "experts", **more}) for more in ({}, {"ep": 2}))
    for found in shared:
        assert relative(found["halves"], whole[0]["halves"]) < 10 * TOLERANCE
    assert relative(whole[0]["halves"][:, 0], whole[0]["halves"][:, 1]) > 0.1


@pytest.mark.parametrize("layout", ["EP 2", "EP 2, all to all", "TP 2 x EP 2, SP", "PP 2 x EP 2", "EP 2, grouped"])
def test_scoring_disturbs_nothing(world2: Any, world4: Any, layout: str) -> None:
    """Guards against a pass that leaves something behind: the scale of the balancing loss, a router's method that is
    not put back, or tokens that a dispatcher keeps."""
    arguments = {k: v for k, v in LAYOUTS[layout].items() if k != "world"} | {"model": "balanced"}
    pool = world4 if LAYOUTS[layout].get("world") == 4 else world2
    never, every = (pool.run(train_and_score, "one_sided", arguments, score=score) for score in ("never", "every"))
    for without, scored in zip(never, every, strict=True):
        assert scored["steps"] == without["steps"]
        assert scored["evaluation"] == without["evaluation"]
        assert scored["weights"].keys() == without["weights"].keys()
        for name, value in without["weights"].items():
            assert torch.equal(scored["weights"][name], value), name


def scores_with_balance(coefficient: float) -> Any:
    """Scores of the initial weights, by a model whose balancing loss has this coefficient."""
    MODELS["this one"] = dataclasses.replace(EXPERTS, moe_aux_loss_coeff=coefficient)
    config = run_config("one_sided", model="this one")
    engine, groups = start(config)
    before = engine.train_step(share_of_rank(batch_of_step(0), groups, 1)).grad_norm
    engine, groups = start(config)
    return scorer_of(engine, groups, config)().alignment, before


def test_the_balancing_loss_is_kept_out(world1: Any) -> None:
    """Guards against scores that ask for balanced experts instead of the target."""
    (without, norm), (with_it, other_norm) = (world1.run(scores_with_balance, c)[0] for c in (0.0, 10.0))
    assert other_norm != norm  # it does enter training
    assert torch.equal(with_it, without)


def with_fault(fault: str, estimator: str, layout: dict[str, Any]) -> dict[str, Any]:
    """As `train_and_score`, with one fault put in."""
    from megatron_opus.backends.model import experts
    from megatron_opus.types import Groups

    def turned(self: Any, expert: int) -> Any:
        return self._rows[expert].roll(1)

    where: dict[str, tuple[Any, str, Any]] = {
        "rows of other sequences": (experts.DispatchedSequences, "sequences", turned),
        "state of the data-parallel group": (Groups, "state_of", lambda self, layer: (self.state, self.state_rank)),
    }
    target, name, wrong = where[fault]
    with mock.patch.object(target, name, wrong):
        return train_and_score(estimator, layout)


@pytest.mark.parametrize("fault", ["rows of other sequences", "state of the data-parallel group"])
def test_the_faults_are_seen(world2: Any, alone: Any, fault: str) -> None:
    """Guards against the tests above being blind: each trap put back moves the alignments or the interactions."""
    truth = alone("one_sided", "experts")
    for found in world2.run(with_fault, fault, "one_sided", {"model": "experts", "ep": 2}):
        assert max(relative(found[name], truth[name]) for name in ("align", "inter")) > 100 * TOLERANCE
