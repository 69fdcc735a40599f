"""Second moments that ZeRO partitions: read where they live, assembled, compared with the unpartitioned ones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import pytest
import torch
from forms import mostly_whole
from gpt_runs import GPT2, QWEN3, newton_schulz
from partitions import relative
from small_models import random_batch
from test_sharded import K_P, LENGTH, N, selection

from megatron_opus.config import (
    DataConfig,
    Geometry,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SelectionConfig,
    TrainingConfig,
)
from megatron_opus.estimates.traffic import scoring_traffic
from megatron_opus.layout.model_layout import model_layout
from megatron_opus.layout.parallel_layout import ParallelLayout


def engine_scores(
    model_name: str,
    stage: int,
    tp: int,
    precision: str,
    config: SelectionConfig,
    steps: int = 3,
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw",
    offload: Literal["none", "cpu"] = "none",
    with_oracle: bool = False,
    sp: bool = False,
) -> dict[str, Any]:
    """Train with the real engine, then score: moments assembled over the data-parallel group, and the signals."""
    import torch.distributed as dist

    from megatron_opus.backends.engines.build import build_engine
    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.model.build import DTYPES
    from megatron_opus.backends.model.gpt import build_gpt, forward_loss
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.backends.model.scored_layers import megatron_layers
    from megatron_opus.data.iterator import SelectedBatchIterator
    from megatron_opus.scoring.scoring_pass import ScoringPass
    from megatron_opus.selection import reference

    newton_schulz(torch.float32)
    model_config = {"gpt2": GPT2, "qwen3": QWEN3}[model_name]
    run = RunConfig(
        name="test",
        model=model_config,
        data=DataConfig(seq_length=LENGTH),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp, zero_stage=stage, offload_optimizer=offload, sequence_parallel=sp
        ),
        # eps: some gradients are 0 but for rounding, and the first steps of AdamW divide them by their own size
        optimizer=OptimizerConfig(name=optimizer, lr=3e-3, muon_lr=2e-2, adam_eps=1e-5),
        training=TrainingConfig(
            micro_batch_size=1, global_batch_size=4, train_steps=10, precision=precision, gradient_clipping=1.0
        ),
        selection=config,
    )
    device = init_distributed(run.parallel)
    groups = init_parallel(run.parallel)
    model = build_gpt(model_config, seq_length=LENGTH, params_dtype=DTYPES[precision], seed=3, sequence_parallel=sp)
    engine = build_engine(model, run, groups)
    iterator = SelectedBatchIterator(dp_rank=groups.dp_rank, dp_size=groups.dp_size)
    share = 4 // groups.dp_size
    layout = model_layout(model_config, tp_size=tp, positions=LENGTH)
    layers = megatron_layers(engine.module, layout)
    scorer = ScoringPass(engine.runner(), layers, engine.optimizer_state(), config, groups=groups, device=device)
    candidates, proxy = random_batch(N, LENGTH, seed=1), random_batch(K_P, LENGTH, seed=2)
    n, p, r = N // groups.dp_size, K_P // groups.dp_size, groups.dp_rank
    mine = candidates.rows(r * n, (r + 1) * n), proxy.rows(r * p, (r + 1) * p)
    before = scorer(*mine).geometry
    losses = []
    for step in range(steps):
        batch = random_batch(4, LENGTH, seed=50 + step).rows(r * share, (r + 1) * share)
        iterator.fill([batch.rows(i, i + 1) for i in range(share)])
        losses.append(engine.train_step(iterator).loss)
        if step < steps - 1:
            scorer(*mine)  # scoring between steps must not change what follows
    state = engine.optimizer_state()
    moments = {}
    adam = optimizer == "adamw" or config.preconditioner.kind == "adamw"
    for layer in layers if adam else ():
        shape = getattr(layer.weight, "ds_shape", layer.weight.shape)
        v = torch.zeros(2, shape.numel())
        for fragment in state.second_moment(layer.weight):
            stop = fragment.start + fragment.values.numel()
            v[0, fragment.start : stop] = fragment.values.float()
            v[1, fragment.start : stop] += 1
        if state.sharded_over_dp and groups.dp is not None:
            dist.all_reduce(v, group=groups.dp)
        assert (v[1] == 1).all(), f"{layer.name}: an element owned by no rank or by two"
        moments[layer.name] = v[0].view(shape)
    signals = scorer(*mine)
    hypers = state.hypers([layer.weight for layer in layers], config.preconditioner.kind)
    weights = torch.cat([w.detach().float().flatten() for w in engine.module.parameters()])
    oracle = None
    if with_oracle:
        named = {layer.name: layer.weight for layer in layers}
        by_name = dict(zip(named, hypers, strict=True))
        if adam:
            precondition = reference.adamw_preconditioner(moments, by_name)
        elif optimizer == "muon" and config.preconditioner.kind == "auto":
            q = {n: state.momentum(w)[0].values.view_as(w) for n, w in named.items()}
            precondition = reference.muon_preconditioner(q, by_name)
        else:
            precondition = reference.sgd_preconditioner(hypers[0].lr)
        gradients = [
            reference.per_sequence_gradients(lambda b: forward_loss(engine.module, b), batch, named)
            for batch in (candidates, proxy)
        ]
        oracle = reference.scores(*gradients, precondition)
    return {
        "oracle": oracle,
        "before": before,
        "geometry": signals.geometry,
        "losses": losses,
        "moments": moments,
        "align": signals.alignment,
        "inter": signals.interaction,
        "bytes": signals.bytes_sent,
        "run": run,
        "steps": {getattr(h, "step", None) for h in hypers},
        "lr": {h.lr for h in hypers},
        "next_lr": engine.lr,
        "weights": weights,
    }


@functools.cache
def replicated(pool, model, precision, config, tp=1):
    """ZeRO stage 0: the moments are whole on every rank."""
    return pool.run(engine_scores, model, 0, tp, precision, config)[0]


@pytest.mark.parametrize("form", ["separable", "exact"])
@pytest.mark.parametrize("stage", [1, 2])
def test_partitioned_state_gives_the_replicated_scores(world2, stage, form):
    """Fault: a partitioned second moment read as if it were whole (defect 2), or state matched by index: with two
    parameter groups the second one's fragments begin in the middle of the flat buffer.

    Tolerance: gradients are summed in another order, 1e-6; AdamW amplifies where v is small.
    """
    config = selection("materialise" if form == "exact" else "two_sided", form)
    truth = replicated(world2, "gpt2", "fp32", config)
    assert truth["geometry"] == f"adamw-{form}"
    for result in world2.run(engine_scores, "gpt2", stage, 1, "fp32", config):
        assert result["before"] == "sgd (no optimizer state yet)"
        assert result["steps"] == {3}
        assert result["lr"] == {result["next_lr"]}
        for name, v in truth["moments"].items():
            assert relative(result["moments"][name], v) < 1e-5, name
        assert relative(result["align"], truth["align"]) < 1e-4
        assert relative(result["inter"], truth["inter"]) < 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_state_is_found_at_every_stage(world2, stage):
    """Fault: bf16 engines keep their state under fp32 masters, per parameter, per group or per partition; the wrong
    key finds nothing or another parameter. bf16 gradients differ by rounding: 2^-8 each, v by twice that."""
    truth = replicated(world2, "gpt2", "fp32", selection())
    for result in world2.run(engine_scores, "gpt2", stage, 1, "bf16", selection()):
        assert result["before"] == "sgd (no optimizer state yet)"
        assert result["geometry"] == "adamw-separable"
        assert result["steps"] == {3}
        for name, v in truth["moments"].items():
            assert relative(result["moments"][name], v) < 0.1, name
        assert torch.corrcoef(torch.stack([result["align"], truth["align"]]))[0, 1] > 0.98


@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_tensor_parallel_times_zero(world2, world4, model):
    """Fault: sums taken over the wrong group when the state is cut both by tensor parallelism and by ZeRO."""
    truth = replicated(world2, model, "fp32", selection())
    for stage in (1, 2):
        for result in world4.run(engine_scores, model, stage, 2, "fp32", selection()):
            assert relative(result["align"], truth["align"]) < 1e-4
            assert relative(result["inter"], truth["inter"]) < 1e-4


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16")])
def test_scoring_leaves_the_engine_as_it_was(world2, stage, precision):
    """Fault: a pass that touches gradients, ZeRO buckets or RNG. Losses and weights are bit-identical without it."""
    scored = world2.run(engine_scores, "gpt2", stage, 1, precision, selection())
    plain = world2.run(train_only, stage, precision)
    for a, b in zip(scored, plain, strict=True):
        assert a["losses"] == b["losses"]
        assert torch.equal(a["weights"], b["weights"])


def train_only(stage: int, precision: str) -> dict[str, Any]:
    from unittest import mock

    from megatron_opus.scoring.scoring_pass import ScoringPass
    from megatron_opus.types import Signals

    nothing = Signals(alignment=torch.zeros(N), interaction=torch.zeros(N, N))
    with mock.patch.object(ScoringPass, "__call__", return_value=nothing):
        return engine_scores("gpt2", stage, 1, precision, selection())


# What a run is scored in: (optimizer, preconditioner.kind) -> geometry of the exact form
GEOMETRIES = {
    ("adamw", "auto"): "adamw-exact",
    ("muon", "auto"): "muon",
    ("muon", "adamw"): "adamw-exact",
    ("muon", "sgd"): "sgd",
    ("sgd", "auto"): "sgd",
}


# Gradients are summed in another order over three steps, 1e-7 a sum. Five Newton-Schulz steps multiply the smallest
# singular directions, which carry that rounding, by 3.4445^5 = 485 in every training step and once more in the frozen
# multiplier, float32 against the oracle's float64. Measured on two processors: 3e-6 and 6e-4 at most; the rest is for
# others.
TOLERANCE, NEWTON_SCHULZ = 3e-5, 5e-3


def exactly(kind: Geometry) -> SelectionConfig:
    """No sketch error in the alignment, and next to none in the interaction (2^17 buckets: 4e-3 of |u||v|)."""
    config = selection("materialise", "exact", 2**17, alignment="direction")
    return dataclasses.replace(config, preconditioner=dataclasses.replace(config.preconditioner, kind=kind))


def sketched(kind: Geometry, alignment: str = "one_sided") -> SelectionConfig:
    config = selection(alignment=alignment)
    return dataclasses.replace(config, preconditioner=dataclasses.replace(config.preconditioner, kind=kind))


@functools.cache
def unpartitioned(pool, model, optimizer, config, tp=1, with_oracle=False):
    """ZeRO 0: all state whole on every data-parallel rank."""
    return pool.run(engine_scores, model, 0, tp, "fp32", config, optimizer=optimizer, with_oracle=with_oracle)


@pytest.mark.parametrize(("optimizer", "kind"), GEOMETRIES)
def test_every_geometry_agrees_with_the_oracle(world2, partition_table, optimizer, kind):
    """Fault: Muon's momentum exists on one rank and every other scores the layer with the identity and without a rate
    (defect 3); a rate, a momentum factor or a shape factor lost between the optimizer and the score."""
    for result in unpartitioned(world2, "gpt2", optimizer, exactly(kind), with_oracle=True):
        assert result["geometry"] == GEOMETRIES[optimizer, kind]
        align, inter = result["oracle"]
        assert relative(result["inter"], inter) < 2e-2
        partition_table.check(
            result,
            align,
            None,
            against="oracle",
            layout=f"gpt2, DP 2, ZeRO 0, {optimizer}, geometry {GEOMETRIES[optimizer, kind]}",
            estimator="direction, exact",
            tolerance=NEWTON_SCHULZ if GEOMETRIES[optimizer, kind] == "muon" else TOLERANCE,
        )


STAGES = [(1, "none"), (2, "none"), (3, "none"), (2, "cpu"), (3, "cpu")]


# Short: the momentum that DeepSpeed's Muon keeps on one rank at every stage, the others where most is cut
@pytest.mark.parametrize(
    ("optimizer", "kind", "stage", "offload"),
    mostly_whole(
        [(*g, *where) for g in GEOMETRIES if g[1] != "sgd" and g[0] != "sgd" for where in STAGES],
        lambda optimizer, kind, *where: (optimizer, kind) == ("muon", "auto") or where in ((3, "none"), (2, "cpu")),
    ),
)
def test_every_zero_stage_gives_the_unpartitioned_scores(world2, partition_table, optimizer, kind, stage, offload):
    """Fault: partitioned, whole-on-one-rank or offloaded state read from the wrong place, or its parts added twice."""
    place = ", offload" if offload == "cpu" else ""
    for name, config in (("direction, exact", exactly(kind)), ("one_sided", sketched(kind))):
        truth = unpartitioned(world2, "gpt2", optimizer, config)[0]
        results = world2.run(engine_scores, "gpt2", stage, 1, "fp32", config, optimizer=optimizer, offload=offload)
        for result in results:
            assert result["geometry"] == truth["geometry"]
            partition_table.check(
                result,
                truth["align"],
                truth["inter"],
                against="the same at ZeRO 0",
                layout=f"gpt2, DP 2, ZeRO {stage}{place}, {optimizer}, geometry {kind}",
                estimator=name,
                tolerance=NEWTON_SCHULZ if (optimizer, kind) == ("muon", "auto") else TOLERANCE,
            )


@pytest.mark.parametrize(
    ("optimizer", "model", "stage", "sp"),
    [
        ("adamw", "qwen3", 3, False),
        ("muon", "gpt2", 2, False),
        ("muon", "qwen3", 3, False),
        ("muon", "gpt2", 0, True),
        ("muon", "qwen3", 2, True),
    ],
)
def test_tensor_parallel_times_zero_in_every_geometry(world2, world4, partition_table, optimizer, model, stage, sp):
    """Fault: a multiplier of the shard applied to tokens of another rank, or sent over the wrong group. Muon's shards
    are orthogonalised one by one, so the truth has the same tensor-parallel degree."""
    config = sketched("auto")
    tp = 1 if optimizer == "adamw" else 2
    truth = unpartitioned(world2, model, optimizer, config, tp)[0]
    for result in world4.run(engine_scores, model, stage, 2, "fp32", config, optimizer=optimizer, sp=sp):
        partition_table.check(
            result,
            truth["align"],
            truth["inter"],
            against=f"the same at TP {tp}, ZeRO 0",
            layout=f"{model}, TP 2{', SP' * sp} x DP 2, ZeRO {stage}, {optimizer}",
            estimator="one_sided",
            tolerance=NEWTON_SCHULZ if optimizer == "muon" else TOLERANCE,
        )


def with_and_without_full_width(model: str, stage: int) -> dict[str, Any]:
    from unittest import mock

    from megatron_opus.scoring.preconditioners import Preconditioners

    own = engine_scores(model, stage, 2, "fp32", sketched("auto"), optimizer="muon", sp=True)
    with mock.patch.object(Preconditioners, "of_shard", return_value=True):
        wide = engine_scores(model, stage, 2, "fp32", sketched("auto"), optimizer="muon", sp=True)
    return {"own": own, "wide": wide}


@pytest.mark.parametrize(("model", "stage"), [("gpt2", 0), ("qwen3", 2)])
def test_muon_gathers_full_width_only_where_its_multiplier_stands(world4, model, stage):
    """Fault: a sketch that is the same on every rank applied after tokens of full width were gathered, bytes that the
    formula does not know; or tokens of another rank under this rank's own multiplier. The same products in both."""
    config = dataclasses.replace(sketched("auto"), proxy_batch_size=K_P)
    for result in world4.run(with_and_without_full_width, model, stage):
        own, wide = result["own"], result["wide"]
        assert relative(own["align"], wide["align"]) < 1e-5
        assert relative(own["inter"], wide["inter"]) < 1e-5
        layout = ParallelLayout(tp=2, dp=2, zero_stage=stage, micro_batch_size=1)
        run = dataclasses.replace(own["run"], selection=config)
        assert own["bytes"] == sum(scoring_traffic(run, layout).values()) < wide["bytes"]
