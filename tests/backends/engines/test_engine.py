"""One optimizer step on every layout against a plain torch loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpt_runs import LENGTH, QWEN3, K, batch_of_step, recipe, share_of_rank, start, steps

from megatron_opus.types import Batch

STEPS = 4
TOLERANCE = {"rel": 2e-5}  # fp32; sums over ranks and microbatches come in another order


def run_steps(arguments: dict[str, Any]) -> list[tuple[float, float]]:
    config = recipe(**arguments)
    engine, groups = start(config)
    return steps(engine, groups, 0, STEPS, config.training.micro_batch_size)


def plain_loop() -> list[tuple[float, float]]:
    """The same recipe by hand on the whole batch: sequence means, clipping, decoupled decay, warm-up."""
    from megatron_opus.backends.engines.schedule import learning_rate
    from megatron_opus.backends.model.build import build_model
    from megatron_opus.backends.model.gpt import forward_loss
    from megatron_opus.backends.model.parallel import init_parallel

    config = recipe()
    init_parallel(config.parallel, seed=config.seed)
    model, rate = build_model(config), learning_rate(config.optimizer, config.training.train_steps)
    decayed = [p for n, p in model.named_parameters() if "layernorm" not in n and not n.endswith("bias")]
    rest = [p for n, p in model.named_parameters() if "layernorm" in n or n.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    results = []
    for step in range(STEPS):
        batch = batch_of_step(step)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        losses = forward_loss(model, batch)
        loss = ((losses * batch.loss_mask).sum(1) / batch.loss_mask.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        results.append((loss.item(), norm.item()))
    return results


@pytest.fixture(scope="module")
def expected(world2: Any) -> list[tuple[float, float]]:
    return world2.run(plain_loop)[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"tp": 1, "zero": 0},
        {"tp": 1, "zero": 1},
        {"tp": 1, "zero": 2},
        {"tp": 2, "zero": 0},
        {"tp": 2, "zero": 1, "sp": True},
        {"tp": 2, "zero": 2},
        {"tp": 1, "zero": 1, "micro_batch_size": 4},
        {"tp": 1, "zero": 2, "micro_batch_size": 1},
        {"tp": 1, "zero": 3},
        {"tp": 2, "zero": 3, "sp": True},
    ],
    ids=str,
)
def test_step_does_not_depend_on_layout(
    world2: Any, expected: list[tuple[float, float]], arguments: dict[str, Any]
) -> None:
    """A shard left out of the gradient norm, norms decayed, a mean over tokens instead of sequences: other losses."""
    for of_rank in world2.run(run_steps, arguments):
        for got, want in zip(of_rank, expected, strict=True):
            assert got == pytest.approx(want, **TOLERANCE)


def test_tensor_and_data_parallel_together(world4: Any, expected: list[tuple[float, float]]) -> None:
    """Data-parallel reduction over the wrong group is invisible as long as one of the two sizes is 1."""
    for of_rank in world4.run(run_steps, {"tp": 2, "zero": 2, "sp": True}):
        for got, want in zip(of_rank, expected, strict=True):
            assert got == pytest.approx(want, **TOLERANCE)


def test_partial_gradients_of_query_key_norms(world2: Any) -> None:
    """q/k norms see only a rank's own heads: without a sum over ranks their gradient is a part of the whole one."""
    one, *_ = world2.run(run_steps, {"tp": 1, "zero": 1, "model": QWEN3})
    for zero in (1, 3):
        two, *_ = world2.run(run_steps, {"tp": 2, "zero": zero, "model": QWEN3})
        for got, want in zip(two, one, strict=True):
            assert got == pytest.approx(want, **TOLERANCE)


@pytest.mark.parametrize("arguments", [{"tp": 1, "zero": z} for z in (0, 1, 2)] + [{"tp": 2, "zero": 0}], ids=str)
def test_bf16(world2: Any, expected: list[tuple[float, float]], arguments: dict[str, Any]) -> None:
    """bf16 of stage 0 once took an extra optimizer step at the start and left shards out of the norm.

    Eight bits of mantissa give about 0.4% per operation; the norm of four steps stays within 2%.
    """
    for of_rank in world2.run(run_steps, {**arguments, "precision": "bf16"}):
        for (loss, norm), (want_loss, want_norm) in zip(of_rank, expected, strict=True):
            assert loss == pytest.approx(want_loss, rel=2e-3)
            assert norm == pytest.approx(want_norm, rel=2e-2)


def masters_at_the_start(zero: int) -> bool:
    """Whether the optimizer's float32 weights are the initial ones."""
    config = recipe(zero=zero, precision="bf16")
    engine, _ = start(config)
    if zero == 0:
        pairs = zip(engine.deepspeed.optimizer.fp32_groups, engine.deepspeed.optimizer.fp16_groups, strict=True)
        return all(torch.equal(a, b.float()) for high, low in pairs for a, b in zip(high, low, strict=True))
    mapped = [p for p in engine.module.parameters() if p._hp_mapping is not None]
    return all(
        torch.equal(
            p._hp_mapping.get_hp_fragment(),
            p.detach()
            .float()
            .flatten()
            .narrow(0, p._hp_mapping.lp_fragment_address.start, p._hp_mapping.lp_fragment_address.numel),
        )
        for p in mapped
    )


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_initial_weights_are_not_decayed(world2: Any, zero: int) -> None:
    """DeepSpeed's bf16 optimizer of stage 0 takes a step on zero gradients at the start, with weight decay."""
    assert world2.run(masters_at_the_start, zero) == [True, True]


def weights_here(engine: Any) -> list[torch.Tensor]:
    return [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]


def skip_and_go_on(arguments: dict[str, Any]) -> dict[str, Any]:

    config = recipe(**arguments)
    engine, groups = start(config)
    first = steps(engine, groups, 0, 1)
    before = weights_here(engine)
    lr = engine.lr
    bad = batch_of_step(1)
    if groups.dp_rank == 1:  # on one rank only: the others must hear of it
        bad.loss_mask[-1, -1] = math.inf
    result = engine.train_step(share_of_rank(bad, groups, 2))
    same = all(torch.equal(a, b) for a, b in zip(before, weights_here(engine), strict=True))
    moment = engine.deepspeed.step_settings.second_moment
    return {
        "skipped": result.skipped,
        "counted": None if moment is None else moment.steps,
        "loss": result.loss,
        "unchanged": same and engine.lr == lr,
        "losses": first + steps(engine, groups, 1, 3),
    }


MUON = {"optimizer": "muon", "kind": "adamw"}


@pytest.mark.parametrize(
    "arguments",
    [
        *({"zero": zero} for zero in (0, 1, 2, 3)),
        *({"zero": zero, "precision": "bf16"} for zero in (0, 1)),
        {"zero": 2, "offload": "cpu"},
        *({"zero": zero, **MUON} for zero in (0, 1, 2, 3)),
        *({"zero": zero, "precision": "bf16", **MUON} for zero in (0, 1, 2, 3)),
        *({"zero": zero, "offload": "cpu", **MUON} for zero in (2, 3)),
    ],
    ids=lambda a: "-".join(map(str, a.values())),
)
def test_a_nan_gradient_is_not_applied(world2: Any, arguments: dict[str, Any]) -> None:
    """One NaN gradient applied makes every weight NaN: the run is lost, and says so only in its loss. Muon would keep
    it in its momentum, the selector in its second moment."""
    results = world2.run(skip_and_go_on, arguments)
    undisturbed = world2.run(run_steps, arguments)
    for result, clean in zip(results, undisturbed, strict=True):
        assert result["counted"] in (None, 1)
        assert result["skipped"]
        assert result["unchanged"]
        assert not math.isfinite(result["loss"])
        assert result["losses"] == clean[:3]


def evaluations(tp: int, zero: int) -> tuple[dict[str, float], dict[str, float], bool]:
    from megatron_opus.backends.model.gpt import forward_loss

    engine, _ = start(recipe(tp=tp, zero=zero))
    batches = {"a": batch_of_step(50, size=5), "b": batch_of_step(51, size=3)}
    engine.module.train()
    got = engine.evaluate(batches, micro_batch_size=2)
    want = {}
    with torch.no_grad():
        for name, batch in batches.items():
            losses = forward_loss(engine.module, batch)
            want[name] = ((losses * batch.loss_mask).sum() / batch.loss_mask.sum()).item()
    return got, want, engine.module.training


@pytest.mark.parametrize(("tp", "zero"), [(1, 1), (2, 1), (1, 3)])
def test_evaluation_is_weighted_by_tokens(world2: Any, tp: int, zero: int) -> None:
    """A mean of the ranks' means: 5 sequences on 2 ranks give the third rank's share another weight. At stage 3 a rank
    with one forward pass less leaves the others waiting for its part of the weights."""
    for got, want, training in world2.run(evaluations, tp, zero):
        assert got == pytest.approx(want, rel=1e-5)
        assert training


def test_sequence_losses() -> None:
    """Dividing by the mask's sum would cancel a sequence's weight; multiplying by 0 keeps the NaN of a masked token."""
    from megatron_opus.backends.engines.losses import sequence_losses

    losses = torch.tensor([[1.0, 3.0, math.nan], [2.0, 4.0, 6.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
    assert sequence_losses(losses, mask).tolist() == [2.0, 2.0, 0.0]


def wrong_microbatch() -> str:

    engine, _ = start(recipe())
    try:
        engine.train_step(iter([batch_of_step(0, size=3)]))
    except ValueError as error:
        return str(error)
    return ""


def test_microbatch_of_another_size(world2: Any) -> None:
    """A short microbatch changes the weight of its sequences without anybody noticing."""
    assert world2.run(wrong_microbatch) == ["microbatch 0: expected 2 sequences, got 3"] * 2


def documents_in_training(tp: int) -> list[float]:
    import dataclasses

    engine, groups = start(recipe(tp=tp))
    batch: Batch = batch_of_step(0)
    ids = torch.stack([(torch.arange(LENGTH) >= 3 + z).int() for z in range(K)])
    marked = dataclasses.replace(batch, document_ids=ids)
    return [engine.train_step(share_of_rank(b, groups, 2)).loss for b in (marked, batch)]


def test_documents_reach_the_attention(world2: Any) -> None:
    """Document ids dropped on the way train on attention across documents."""
    (marked, plain), *_ = world2.run(documents_in_training, 1)
    assert marked != plain
    assert world2.run(documents_in_training, 2)[0] == pytest.approx([marked, plain], rel=1e-5)


def test_unclipped_layout_is_the_recipes() -> None:
    """K that does not divide would be rounded by DeepSpeed's own arithmetic."""
    from megatron_opus.backends.engines.deepspeed.engine import deepspeed_config
    from megatron_opus.config import ConfigError

    assert deepspeed_config(recipe(), 2, 1000)["gradient_accumulation_steps"] == 2
    with pytest.raises(ConfigError, match="multiple of micro_batch_size x data-parallel size"):
        deepspeed_config(recipe(micro_batch_size=3), 2, 1000)
