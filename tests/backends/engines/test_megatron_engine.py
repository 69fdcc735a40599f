"""Megatron's own engine against DeepSpeed's: the same steps from the same recipe, undisturbed by scoring."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpt_runs import QWEN3, batch_of_step, recipe, share_of_rank, start, steps

STEPS = 4
TOLERANCE = {"rel": 2e-5}  # fp32; sums over ranks and microbatches come in another order
REPLICATED = {"engine": "megatron", "use_distributed_optimizer": False}
DISTRIBUTED = {"engine": "megatron"}
OVERLAPS = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
ENGINES = {"replicated": REPLICATED, "distributed": DISTRIBUTED, "overlaps": OVERLAPS}


def run_steps(arguments: dict[str, Any]) -> list[tuple[float, float]]:
    config = recipe(**arguments)
    engine, groups = start(config)
    return steps(engine, groups, 0, STEPS, config.training.micro_batch_size)


@pytest.fixture(scope="module")
def expected(world2: Any) -> dict[str, list[tuple[float, float]]]:
    """What DeepSpeed does, at ZeRO 1 and tensor parallel 1."""
    return {
        "adamw": world2.run(run_steps, {})[0],
        "sgd": world2.run(run_steps, {"optimizer": "sgd"})[0],
        "qwen3": world2.run(run_steps, {"model": QWEN3})[0],
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "sp": True}, {"micro_batch_size": 1}], ids=str)
def test_both_engines_take_the_same_steps(
    world2: Any, expected: dict[str, Any], engine: str, layout: dict[str, Any]
) -> None:
    """Guards against shards that are not marked (the gradient norm counts replicated weights twice), decayed norms, a
    loss that is not divided as the schedule divides it, and gradients of norms summed twice or never."""
    for of_rank in world2.run(run_steps, {**layout, "parallel": ENGINES[engine]}):
        for got, want in zip(of_rank, expected["adamw"], strict=True):
            assert got == pytest.approx(want, **TOLERANCE)


def test_tensor_and_data_parallel_together(world4: Any, expected: dict[str, Any]) -> None:
    """Guards against a reduction over the wrong group, invisible as long as one of the two sizes is 1."""
    for of_rank in world4.run(run_steps, {"tp": 2, "sp": True, "parallel": OVERLAPS}):
        for got, want in zip(of_rank, expected["adamw"], strict=True):
            assert got == pytest.approx(want, **TOLERANCE)


def test_other_optimizers_and_models(world2: Any, expected: dict[str, Any]) -> None:
    """Guards against SGD with another momentum or decay, and against query/key norms of which each rank sees a part."""
    for kind, arguments in (
        ("sgd", {"optimizer": "sgd", "parallel": REPLICATED}),
        ("qwen3", {"model": QWEN3, "tp": 2, "parallel": DISTRIBUTED}),
    ):
        for of_rank in world2.run(run_steps, arguments):
            for got, want in zip(of_rank, expected[kind], strict=True):
                assert got == pytest.approx(want, **TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tp", [1, 2])
def test_bf16(world2: Any, expected: dict[str, Any], engine: str, tp: int) -> None:
    """Guards against gradients summed in bf16. Eight bits of mantissa give about 0.4% per operation."""
    for of_rank in world2.run(run_steps, {"tp": tp, "precision": "bf16", "parallel": ENGINES[engine]}):
        for (loss, norm), (want_loss, want_norm) in zip(of_rank, expected["adamw"], strict=True):
            assert loss == pytest.approx(want_loss, rel=2e-3)
            assert norm == pytest.approx(want_norm, rel=2e-2)


def unmarked(arguments: dict[str, Any]) -> list[tuple[float, float]]:
    """As `run_steps`, with the fault that Megatron's own initialisation would not have: no parameter is marked."""
    from unittest import mock

    from megatron_opus.backends.model import gpt

    def unmark(model: torch.nn.Module, layout: Any) -> None:
        for parameter in model.parameters():  # newer releases mark some by themselves
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]

    with mock.patch.object(gpt, "_mark_parameters", unmark):
        return run_steps(arguments)


def test_unmarked_parameters_are_seen(world2: Any, expected: dict[str, Any]) -> None:
    """Guards against the tests above being blind: without the marks the norm misses shards, and clipping is wrong."""
    for of_rank in world2.run(unmarked, {"tp": 2, "parallel": DISTRIBUTED}):
        assert of_rank[0][1] != pytest.approx(expected["adamw"][0][1], rel=1e-3)


def skip_and_go_on(arguments: dict[str, Any]) -> dict[str, Any]:
    config = recipe(**arguments)
    engine, groups = start(config)
    first = steps(engine, groups, 0, 1)
    with engine._gathered():
        before = [p.detach().clone() for p in engine.module.parameters()]
    lr = engine.lr
    bad = batch_of_step(1)
    if groups.dp_rank == groups.dp_size - 1:  # on one rank only: the others must hear of it
        bad.loss_mask[-1, -1] = math.inf
    result = engine.train_step(share_of_rank(bad, groups, 2))
    with engine._gathered():
        same = all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
    return {
        "skipped": result.skipped and result.grad_norm == math.inf,
        "loss": result.loss,
        "unchanged": same and engine.lr == lr,
        "losses": first + steps(engine, groups, 1, 3),
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_nan_gradient_is_not_applied(world2: Any, engine: str, precision: str) -> None:
    """Guards against one NaN gradient that makes every weight NaN: Megatron itself takes such a step in bf16."""
    arguments = {"precision": precision, "parallel": ENGINES[engine]}
    undisturbed = world2.run(run_steps, arguments)
    for result, clean in zip(world2.run(skip_and_go_on, arguments), undisturbed, strict=True):
        assert result["skipped"]
        assert result["unchanged"]
        assert not math.isfinite(result["loss"])
        assert result["losses"] == clean[:3]


def test_microbatch_of_another_size(world2: Any) -> None:
    """Guards against a short microbatch, which changes the weight of its sequences without anybody noticing."""
    assert world2.run(wrong_microbatch) == ["microbatch 0: expected 2 sequences, got 3"] * 2


def wrong_microbatch() -> str:
    engine, _ = start(recipe(parallel=DISTRIBUTED))
    try:
        engine.train_step(iter([batch_of_step(0, size=3)]))
    except ValueError as error:
        return str(error)
    return ""
