"""State of Megatron's optimizers, read from its ranks, against training by hand in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import DistributedPool
from gpt_runs import batch_of_step, recipe, start, steps

from megatron_opus.types import AdamHyper, SgdHyper

STEPS = 3
ENGINES = {
    "replicated": {"engine": "megatron", "use_distributed_optimizer": False},
    "distributed": {"engine": "megatron"},
    "overlaps": {"engine": "megatron", "overlap_grad_reduce": True, "overlap_param_gather": True},
}
TOLERANCE = 2e-5  # fp32; sums over ranks and microbatches come in another order
BF16_TOLERANCE = 0.1  # 2^-8 for each rounded gradient, twice that in a square, over three steps


def assembled(state: Any, layer: Any, groups: Any) -> torch.Tensor:
    """The whole matrix of second moments from what the ranks hold, each element exactly once."""
    import torch.distributed as dist

    rows, cols = (torch.cat([torch.arange(s, s + n) for s, n in r]) for r in (layer.rows, layer.cols))
    local = torch.zeros(2, len(rows) * len(cols))
    for fragment in state.second_moment(layer.weight):
        stop = fragment.start + fragment.values.numel()
        local[0, fragment.start : stop] += fragment.values.float()
        local[1, fragment.start : stop] += 1
    if state.sharded_over_dp and groups.dp is not None:
        dist.all_reduce(local, group=groups.dp)
    held = torch.zeros(2, layer.d_out, layer.d_in)
    held[:, rows[:, None], cols[None, :]] = local.view(2, len(rows), len(cols))
    if groups.tp is not None:
        dist.all_reduce(held, group=groups.tp)
    assert (held[1] == 1).all(), "owned by no rank or by two"
    return held[0]


def read(arguments: dict[str, Any]) -> dict[str, Any]:
    from megatron_opus.backends.model.scored_layers import megatron_layers
    from megatron_opus.config import SelectionConfig

    config = recipe(**arguments)
    engine, groups = start(config)
    selection = SelectionConfig(score_embedding=True, score_output_layer=True)
    layers = {layer.name: layer for layer in megatron_layers(engine.module, None, selection)}
    state = engine.optimizer_state()
    before = state.hypers([x.weight for x in layers.values()])
    steps(engine, groups, 0, STEPS)
    weights = [x.weight for x in layers.values()]
    # of every parameter, biases and norms included: their groups have another weight decay
    every = dict(engine.module.named_parameters())
    places = {n: state._where[id(p)] for n, p in every.items()}
    decays = {n: x.part.param_groups[x.group]["weight_decay"] for n, x in places.items()}
    adamw = config.optimizer.name == "adamw"
    return {
        "before": before,
        "hypers": state.hypers(weights),
        "decays": decays,
        "nothing owned": sum(not state.second_moment(p) for p in every.values()),
        "moments": {n: assembled(state, x, groups) for n, x in layers.items()} if adamw else {},
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process, torch's AdamW by hand."""
    pool = DistributedPool(1)
    try:
        return pool.run(read_alone)[0]
    finally:
        pool.close()


def read_alone() -> dict[str, Any]:
    """AdamW by hand on the whole batch."""
    from megatron_opus.backends.engines.schedule import learning_rate
    from megatron_opus.backends.model.build import build_model
    from megatron_opus.backends.model.gpt import forward_loss
    from megatron_opus.backends.model.parallel import init_parallel

    config = recipe()
    o, rate = config.optimizer, learning_rate(config.optimizer, config.training.train_steps)
    init_parallel(config.parallel, seed=config.seed)
    model = build_model(config)
    names = dict(model.named_parameters())
    groups = [{"params": [p for p in names.values() if (p.ndim >= 2) is matrices], "weight_decay": decay}
              for matrices, decay in ((True, o.weight_decay), (False, 0.0))]  # fmt: skip
    adamw = torch.optim.AdamW(groups, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps)
    for step in range(STEPS):
        batch = batch_of_step(step)
        losses = forward_loss(model, batch)
        model.zero_grad()
        ((losses * batch.loss_mask).sum(1) / batch.loss_mask.sum(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        for group in adamw.param_groups:
            group["lr"] = rate(step)
        adamw.step()
    return {
        "moments": {n.removesuffix(".weight"): adamw.state[p]["exp_avg_sq"] for n, p in names.items()},
        "decays": {n: o.weight_decay if p.ndim >= 2 else 0.0 for n, p in names.items()},
        "lr": rate(STEPS),
        "first lr": rate(0),
    }


def check(results: list[dict[str, Any]], alone: dict[str, Any], tolerance: float) -> None:
    want = AdamHyper(lr=alone["lr"], beta1=0.9, beta2=0.95, eps=1e-8, step=STEPS)
    for result in results:
        assert result["hypers"] == [want] * len(result["hypers"])
        assert result["before"] == [AdamHyper(lr=alone["first lr"], beta1=0.9, beta2=0.95, eps=1e-8, step=0)] * len(
            result["before"]
        )
        assert result["decays"] == alone["decays"]
        for name, moment in result["moments"].items():
            truth = alone["moments"][name]
            assert float((moment - truth).norm() / truth.norm()) < tolerance, name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_of_two_data_parallel_ranks(world2: Any, alone: Any, engine: str, precision: str) -> None:
    """Guards against a range of the gradient buffer taken for one of the parameter, the float32 copy of a bf16 weight
    not found, and the group of a parameter guessed on a rank that owns nothing of it."""
    results = world2.run(read, {"parallel": ENGINES[engine], "precision": precision})
    check(results, alone, TOLERANCE if precision == "fp32" else BF16_TOLERANCE)
    if engine == "distributed":  # the case is there: some parameters lie on one of the two ranks alone
        assert all(result["nothing owned"] for result in results)


@pytest.mark.parametrize("engine", ENGINES)
def test_state_of_tensor_and_data_parallel_ranks(world4: Any, alone: Any, engine: str) -> None:
    """Guards against state that is added up over the wrong group: TP 2 x DP 2."""
    check(world4.run(read, {"tp": 2, "sp": True, "parallel": ENGINES[engine]}), alone, TOLERANCE)


def test_sgd_has_no_second_moment(world2: Any, alone: Any) -> None:
    """Guards against a rate of SGD without the schedule, or a geometry that its state cannot give."""
    for result in world2.run(read, {"optimizer": "sgd", "parallel": ENGINES["replicated"]}):
        assert result["hypers"] == [SgdHyper(lr=alone["lr"])] * len(result["hypers"])
        assert result["decays"] == alone["decays"]
