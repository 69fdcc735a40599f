"""Training with a scoring pass before every microbatch, bit for bit the training without: every stage and optimizer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from forms import mostly_whole
from gpt_runs import GPT2, LENGTH, QWEN3, batch_of_step, recipe, share_of_rank, start
from megatron_muon import KINDS, layout_of, needs_muon
from small_models import random_batch

from megatron_opus.config import SelectionConfig
from megatron_opus.layout.model_layout import recipe_layout
from megatron_opus.types import Batch

STEPS = 3
DROPOUT = dataclasses.replace(GPT2, hidden_dropout=0.1, attention_dropout=0.1)
NORMS = dataclasses.replace(QWEN3, hidden_dropout=0.1)


def scorer_of(engine: Any, groups: Any, config: Any) -> Any:
    from megatron_opus.backends.model.scored_layers import megatron_layers
    from megatron_opus.scoring.scoring_pass import ScoringPass

    layers, state = megatron_layers(engine.module, recipe_layout(config)), engine.optimizer_state()
    selection = dataclasses.replace(SelectionConfig(), score_length=LENGTH // 2)
    runner, device = engine.runner(), torch.device(engine.device)
    verify = None if runner.incomparable else runner  # the comparison with autograd must disturb nothing either
    scorer = ScoringPass(runner, layers, state, selection, groups=groups, device=device, verify=verify)
    mine = [random_batch(4, LENGTH, seed=i).rows(2 * groups.dp_rank, 2 * groups.dp_rank + 2) for i in (1, 2)]
    return lambda: scorer(*mine)


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """Weights (at stage 3: this rank's parts), optimizer state, random states."""
    from megatron_opus.backends.engines.deepspeed.partition import Partition
    from megatron_opus.backends.model.parallel import rng_tracker

    found = {
        f"weight {name}": getattr(p, "ds_tensor", p).detach().clone() for name, p in engine.module.named_parameters()
    }
    if hasattr(engine, "deepspeed"):
        states = Partition(engine.deepspeed).optimizer.state.values()
    else:
        from megatron_opus.backends.engines.megatron.muon import leaves

        states = [v for part, _ in leaves(engine._optimizer) for v in part.optimizer.state.values()]
    for i, state in enumerate(states):
        found |= {f"state {i} {k}": torch.as_tensor(v).clone() for k, v in state.items()}
    found["random"] = torch.get_rng_state()
    return found | {f"random {k}": v for k, v in rng_tracker().get_states().items()}


def run(
    arguments: dict[str, Any], scored: bool, kind: str = ""
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], bool]:
    with layout_of(kind):
        return _run(dict(arguments), scored)


def _run(arguments: dict[str, Any], scored: bool) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], bool]:
    muon = arguments.pop("muon", {})
    config = recipe(**arguments)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **muon))
    engine, groups = start(config)
    score = scorer_of(engine, groups, config)
    finite = True

    def microbatches(batch: Batch) -> Iterator[Batch]:
        nonlocal finite
        for micro in share_of_rank(batch, groups, 2):
            if scored:  # before the first microbatch of a step, and between the accumulated ones
                finite = finite and bool(torch.isfinite(score().alignment).all())
            yield micro

    losses = []
    for step in range(STEPS):
        result = engine.train_step(microbatches(batch_of_step(step)))
        losses.append((result.loss, result.grad_norm))
    return losses, everything(engine), finite


def compare(pool: Any, arguments: dict[str, Any], kind: str = "") -> None:
    plain, scored = (pool.run(run, arguments, flag, kind) for flag in (False, True))
    for (losses, state, _), (losses_scored, state_scored, finite) in zip(plain, scored, strict=True):
        assert finite
        assert losses_scored == losses
        assert state_scored.keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(state_scored[name], value), name


# Short: every stage under AdamW and Muon, where a stage cuts nothing in one precision and where it does in the other
ALWAYS = {("adamw", 0, "fp32"), ("adamw", 1, "bf16"), ("adamw", 2, "fp32"), ("adamw", 3, "bf16")}
ALWAYS |= {("muon", 0, "bf16"), ("muon", 1, "fp32"), ("muon", 2, "bf16"), ("muon", 3, "bf16"), ("sgd", 3, "fp32")}


@pytest.mark.parametrize(
    ("optimizer", "zero", "precision"),
    mostly_whole(
        itertools.product(["adamw", "muon", "sgd"], [0, 1, 2, 3], ["fp32", "bf16"]), lambda *case: case in ALWAYS
    ),
)
def test_scoring_disturbs_nothing(world2: Any, optimizer: str, zero: int, precision: str) -> None:
    """Fault: a gradient hook, a ZeRO bucket, a gathered parameter or a random state that the pass leaves changed."""
    compare(world2, {"optimizer": optimizer, "zero": zero, "precision": precision, "model": DROPOUT})


@pytest.mark.parametrize("zero", [2, 3])
def test_scoring_disturbs_no_offloaded_optimizer(world2: Any, zero: int) -> None:
    """Fault: gradients that are accumulated on the host between microbatches."""
    compare(world2, {"optimizer": "muon", "kind": "adamw", "zero": zero, "offload": "cpu", "model": DROPOUT})


@pytest.mark.parametrize(
    ("zero", "optimizer"),
    mostly_whole(
        [(0, "muon"), (2, "muon"), (3, "adamw"), (3, "muon")], lambda *case: case in ((2, "muon"), (3, "adamw"))
    ),
)
def test_scoring_disturbs_nothing_under_tensor_parallelism(world4: Any, zero: int, optimizer: str) -> None:
    """Fault: sums of partial gradients (query/key norms, sequence parallelism) run by the pass, or left out after."""
    compare(world4, {"optimizer": optimizer, "zero": zero, "tp": 2, "sp": True, "model": NORMS})


MEGATRON = {
    "replicated": {"engine": "megatron", "use_distributed_optimizer": False},
    "distributed": {"engine": "megatron"},
    "overlaps": {"engine": "megatron", "overlap_grad_reduce": True, "overlap_param_gather": True},
}


@pytest.mark.parametrize(
    ("kind", "precision"),
    mostly_whole(
        itertools.product(MEGATRON, ["fp32", "bf16"]),
        lambda kind, precision: (kind == "replicated") == (precision == "fp32"),
    ),
)
def test_scoring_disturbs_nothing_of_megatrons_engine(world2: Any, kind: str, precision: str) -> None:
    """Fault: a gradient buffer, a bucket's counter or a gathered weight that the pass leaves changed, between steps or
    inside an accumulation."""
    compare(world2, {"parallel": MEGATRON[kind], "precision": precision, "model": DROPOUT})


@pytest.mark.parametrize("kind", mostly_whole(MEGATRON, lambda kind: kind != "distributed"))
def test_scoring_disturbs_nothing_of_megatrons_engine_under_tensor_parallelism(world4: Any, kind: str) -> None:
    """Fault: gradients of norms that Megatron adds up at the end of a step, added up by the pass as well."""
    compare(world4, {"parallel": MEGATRON[kind], "tp": 2, "sp": True, "model": NORMS})


def test_scoring_disturbs_nothing_of_megatrons_sgd(world2: Any) -> None:
    """Fault: a momentum that the pass reads as its own."""
    compare(world2, {"parallel": MEGATRON["replicated"], "optimizer": "sgd", "model": DROPOUT})


@needs_muon
@pytest.mark.parametrize("kind", KINDS)
def test_scoring_disturbs_nothing_of_megatrons_muon(world2: Any, kind: str) -> None:
    """Fault: a momentum that the pass multiplies in place, or matrices gathered by it that belong to a later step."""
    compare(world2, {**KINDS[kind], "optimizer": "muon", "model": DROPOUT}, kind)


@needs_muon
@pytest.mark.parametrize("mode", ["blockwise", "duplicated", "distributed"])
def test_scoring_disturbs_nothing_of_megatrons_muon_under_tensor_parallelism(world4: Any, mode: str) -> None:
    """Fault: a reduction of the pass that pairs with one of Muon's own over the same ranks."""
    arguments = {"optimizer": "muon", "tp": 2, "sp": True, "model": DROPOUT, "muon": {"muon_tp_mode": mode}}
    for kind in ("plain", "layer-wise, overlaps"):
        compare(world4, {**KINDS[kind], **arguments}, kind)
