"""Scores of a model of Transformer Engine's layers, by a stand-in on the CPU, against those of Megatron's own."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any
from unittest import mock

import pytest
import te_stand_in
import torch
from distributed import DistributedPool
from gpt_runs import GPT2, LENGTH, QWEN3
from partitions import relative
from small_models import random_batch

import megatron_opus
from megatron_opus.config import ConfigError, ParallelConfig, SelectionConfig, SketchConfig

N, K_P, TOLERANCE = 8, 4, 1e-5
MODELS = {"LayerNorm": dataclasses.replace(GPT2, untie_embeddings_and_output_weights=True), "RMSNorm": QWEN3}


def scores(
    kind: str, stand_in: bool, *, tp: int = 1, centered: bool = False, fault: str = "", precision: Any = "model"
) -> dict[str, Any]:
    """Two steps of AdamW with the local layers, then scores with them or with the stand-ins of the same weights."""
    from megatron_opus.backends.model import te_layers
    from megatron_opus.backends.model.gpt import build_gpt, forward_loss
    from megatron_opus.backends.model.parallel import init_parallel

    groups = init_parallel(ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=tp > 1))
    model = build_gpt(MODELS[kind], seq_length=LENGTH, seed=3, sequence_parallel=tp > 1)
    with torch.no_grad():  # norms of 1 would hide a norm that is left out
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5, weight_decay=0.0)
    for step in range(2):
        optimizer.zero_grad()
        forward_loss(model, random_batch(4, LENGTH, seed=50 + step)).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    layers = []
    if stand_in:
        te_stand_in.swap(model, zero_centered_gamma=centered)
        layers = [m for m in model.modules() if isinstance(m, te_stand_in.Linear)]
        for layer in layers:
            layer.is_first_microbatch = False
    config = SelectionConfig(
        sketch=SketchConfig(dim=256, one_sided_dim=12), score_length=LENGTH, score_precision=precision
    )
    n, p, r = N // groups.dp_size, K_P // groups.dp_size, groups.dp_rank
    candidates, proxy = random_batch(N, LENGTH, seed=1, masked=True), random_batch(K_P, LENGTH, seed=2)
    wrong = {"no norm": {"input_of": lambda module: None}}.get(fault, {"input_of": te_layers.input_of})
    with mock.patch.multiple(te_layers, **wrong), mock.patch.dict(sys.modules, te_stand_in.fp8_modules()):
        found = megatron_opus.score(
            model,
            candidates.rows(r * n, (r + 1) * n),
            proxy.rows(r * p, (r + 1) * p),
            optimizer,
            config=config,
            verify=not fault,
        )
    return {
        "align": found.alignment,
        "inter": found.interaction,
        "coverage": found.coverage,
        "first": [layer.firsts[0] for layer in layers],
        "after": [layer.is_first_microbatch for layer in layers],
        "in fp8": [layer.calls_in_fp8 for layer in layers],
        "says fp8": [layer.fp8 or layer.fp8_meta["fp8_checkpoint"] for layer in layers],
    }


@pytest.fixture(scope="module")
def world1() -> Any:
    pool = DistributedPool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("centered", [False, True], ids=["gamma", "zero-centred gamma"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tp", [1, 2])
def test_scores_are_those_of_the_local_layers(
    world1: Any, world2: Any, partition_table: Any, kind: str, tp: int, centered: bool
) -> None:
    """Guards against layers that are not recognised, an input read before its norm, and flags of the first micro-batch
    that a step finds changed."""
    truth = world1.run(scores, kind, False)[0]
    for found in (world2 if tp == 2 else world1).run(scores, kind, True, tp=tp, centered=centered):
        layout = f"{kind}, stand-in for Transformer Engine, TP {tp}{', SP' if tp > 1 else ''}, AdamW"
        partition_table.check(
            found, truth["align"], truth["inter"], against="Megatron's own layers", layout=layout,
            estimator="one_sided", tolerance=TOLERANCE,
        )  # fmt: skip
        if tp == 1:  # of this rank's shards, beside which position embeddings are whole on every rank
            assert found["coverage"] == pytest.approx(truth["coverage"])
        assert found["first"] == [True] * 8  # copies of the weights of before the last step would be read otherwise
        assert found["after"] == [False] * 8


def test_a_norm_left_out_is_seen(world1: Any) -> None:
    """Guards against the test above being blind."""
    truth, found = world1.run(scores, "RMSNorm", False)[0], world1.run(scores, "RMSNorm", True, fault="no norm")[0]
    assert relative(found["align"], truth["align"]) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", MODELS)
def test_a_pass_in_fp8(world1: Any, kind: str) -> None:
    """Guards against an option that changes nothing, a context that stays open for training, layers whose checkpoint
    says fp8 afterwards, and a comparison with autograd that fp8's rounding fails."""
    exact, low = (world1.run(scores, kind, True, precision=p)[0] for p in ("model", "fp8"))
    assert exact["in fp8"] == [0] * 8
    assert low["in fp8"] == [2] * 8  # candidates and proxy; the comparison runs in the model's precision
    assert low["says fp8"] == [False] * 8
    # 3 bits of mantissa round by 4 % of a number in the mean; sums over many numbers by less
    assert 1e-3 < relative(low["align"], exact["align"]) < 0.1
    assert 1e-3 < relative(low["inter"], exact["inter"]) < 0.1


def fp8_refusals() -> dict[str, str]:
    from megatron_opus.backends.model.gpt import build_gpt
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.scoring.fp8 import Fp8

    init_parallel(ParallelConfig())
    local = build_gpt(QWEN3, seq_length=LENGTH)
    te = te_stand_in.swap(build_gpt(QWEN3, seq_length=LENGTH))
    in_fp8 = te_stand_in.swap(build_gpt(QWEN3, seq_length=LENGTH))
    in_fp8.config.fp8 = "hybrid"
    old = te_stand_in.fp8_modules()
    del old["transformer_engine.common.recipe"].Float8CurrentScaling
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "found none": (te, dict.fromkeys(te_stand_in.fp8_modules())),  # None: an import fails
        "2.2 or later": (te, old),
        "a GPU that computes in fp8, got none: too old": (te, te_stand_in.fp8_modules(available=False)),
        "got one that trains in fp8": (in_fp8, te_stand_in.fp8_modules()),
        "layers of Transformer Engine in the model, found none": (local, te_stand_in.fp8_modules()),
    }
    found = {}
    for name, (model, modules) in cases.items():
        with mock.patch.dict(sys.modules, modules), pytest.raises(ConfigError) as error:
            Fp8([model])
        found[name] = str(error.value)
    return found


def test_fp8_is_refused_where_it_cannot_be(world1: Any) -> None:
    """Guards against scores in another precision than was asked for."""
    for name, said in world1.run(fp8_refusals)[0].items():
        assert "selection.score_precision: fp8" in said
        assert name in said


REFUSED = {
    "CUDA graphs": {"cuda_graph_impl": "transformer_engine"},
    "delay_wgrad_compute": {"delay_wgrad_compute": True},
    "overlap_dispatch_backward_with_experts_wgrad": {"overlap_dispatch_backward_with_experts_wgrad": True},
    "tp_comm_overlap": {"tp_comm_overlap": True},
    "fp8_recipe delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
}


class TEFusedMLP(torch.nn.Module):
    """Of the name by which a fused MLP is known."""


def refusals() -> dict[str, str]:
    from megatron_opus.backends.model import te_layers
    from megatron_opus.backends.model.gpt import build_gpt
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.backends.model.scored_layers import megatron_layers

    init_parallel(ParallelConfig())
    model = te_stand_in.swap(build_gpt(QWEN3, seq_length=LENGTH))
    assert len(megatron_layers(model)) == 8
    found = {}
    for name, values in REFUSED.items():
        kept = {key: getattr(model.config, key, None) for key in values}  # None: a release without it
        vars(model.config).update(values)
        with pytest.raises(ConfigError) as error:
            megatron_layers(model)
        found[name] = str(error.value)
        vars(model.config).update(kept)
    with pytest.raises(ConfigError) as error:
        te_layers.check(model.config, [TEFusedMLP()])
    found["TEFusedMLP"] = str(error.value)
    return found


def test_what_hides_or_would_be_disturbed_is_refused(world1: Any) -> None:
    """Guards against hooks that never fire, and against a pass that changes what the next training step computes."""
    for name, said in world1.run(refusals)[0].items():
        assert name in said
