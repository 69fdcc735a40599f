"""Our Megatron models against `transformers`, from the same weights, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from torch.nn import functional

from megatron_opus.weights.convert import hf_to_opus, opus_to_hf

MODELS = [(kind, tied) for kind in ("gpt2", "qwen3", "llama") for tied in (True, False)]
NAMES = [f"{kind}-{'tied' if tied else 'untied'}" for kind, tied in MODELS]
# float32 twice, in other orders of summation; the logits are of the order of 1 to 10.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=MODELS, ids=NAMES)
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, tied = request.param
    return hf_models.save(tmp_path_factory.mktemp("hf") / f"{kind}_{tied}", kind, tied=tied)


def assert_same(result: dict[str, Any], want: torch.Tensor) -> None:
    logits = result["logits"]
    assert logits.shape[-1] == 96
    torch.testing.assert_close(logits[..., : hf_models.VOCAB], want, rtol=0, atol=TOLERANCE)
    assert want.std() > 0.3  # of logits that are all alike, anything would agree
    ids = hf_models.tokens()
    losses = functional.cross_entropy(want[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(result["losses"], losses, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_model_started_from_published_weights_computes_the_same(world2: Any, model: Path, tp: int) -> None:
    """Fault: q, k, v or gate and up exchanged, Conv1D not transposed, heads cut through, another rotary base or
    epsilon, the padding rows of the vocabulary taking probability: all train, none is the published model."""
    for result in world2.run(hf_models.our_logits, hf_models.recipe_for(model, tp)):
        assert_same(result, hf_models.published_logits(model))


@pytest.mark.parametrize(("stored", "run"), [(2, 1), (2, 2), (4, 2)])
def test_converted_weights_serve_every_degree(world2: Any, model: Path, tmp_path: Path, stored: int, run: int) -> None:
    """Fault: shards of one degree read as those of another, which has the same sizes when both halve."""
    hf_to_opus(model, tmp_path / "ours", tp_size=stored, make_vocab_size_divisible_by=32)
    result = world2.run(hf_models.our_logits, hf_models.recipe_for(model, run), tmp_path / "ours")[0]
    assert_same(result, hf_models.published_logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 4])
def test_a_round_trip_changes_no_bit(model: Path, tmp_path: Path, tp: int, dtype: torch.dtype) -> None:
    """Fault: a tensor that loses bits, rows or its name on the way; two that are exchanged there and back show in the
    parity above."""
    kind, tied = model.name.split("_")
    source = hf_models.save(tmp_path / "source", kind, tied=tied == "True", dtype=dtype, max_shard_size="20KB")
    assert (source / "model.safetensors.index.json").is_file()  # sharded, as the large published ones are
    hf_to_opus(source, tmp_path / "ours", tp_size=tp, make_vocab_size_divisible_by=32)
    opus_to_hf(tmp_path / "ours", tmp_path / "back", max_shard_bytes=20_000)
    before, after = hf_models.raw_tensors(source), hf_models.raw_tensors(tmp_path / "back")
    assert list((tmp_path / "back").glob("model-0000*-of-*.safetensors"))
    assert set(before) == set(after)
    for name, value in before.items():
        assert value.dtype == after[name].dtype == dtype
        assert torch.equal(value, after[name]), name
    assert torch.equal(hf_models.published_logits(tmp_path / "back"), hf_models.published_logits(source))
    (tmp_path / "ours/source_config.json").unlink()  # as after training from random weights: no config.json to go by
    opus_to_hf(tmp_path / "ours", tmp_path / "alone")
    assert torch.equal(hf_models.published_logits(tmp_path / "alone"), hf_models.published_logits(source))


def trained(recipe: Any, output: Path) -> dict[str, Any]:
    """A few steps from the published weights, a checkpoint, and what the trained model computes."""
    import torch.distributed as dist
    from gpt_runs import batch_of_step, share_of_rank

    from megatron_opus.backends.engines.build import build_engine
    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.model.build import build_model
    from megatron_opus.backends.model.gpt import forward_loss
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.training import checkpoint
    from megatron_opus.types import Batch
    from megatron_opus.weights.initial_weights import load_initial_weights

    init_distributed(recipe.parallel)
    groups = init_parallel(recipe.parallel)
    gpt = build_model(recipe)
    load_initial_weights(gpt, recipe, groups)
    engine = build_engine(gpt, recipe, groups)
    for step in range(2):
        engine.train_step(share_of_rank(batch_of_step(step, size=4), groups, 2))
    checkpoint.save(engine, output, step=2, state={}, fingerprints={}, config=recipe, keep=1)
    engine.module.eval()
    return hf_models.logits_of(engine.module, groups, dist, forward_loss, Batch)


@pytest.mark.parametrize(
    ("kind", "tied", "tp", "zero", "precision"),
    [
        ("gpt2", True, 2, 0, "fp32"),
        ("qwen3", False, 2, 1, "fp32"),
        ("qwen3", True, 1, 2, "bf16"),
        ("gpt2", True, 1, 3, "fp32"),
        ("llama", True, 2, 1, "fp32"),
        ("qwen3", False, 1, 3, "bf16"),
    ],
)
def test_a_trained_checkpoint_is_exported(
    world2: Any, tmp_path: Path, kind: str, tied: bool, tp: int, zero: int, precision: str
) -> None:
    """Fault: an export of the initial weights, of one rank's shard, or of partitions put together in another order."""
    source = hf_models.save(tmp_path / "source", kind, tied=tied)
    recipe = hf_models.recipe_for(
        source, tp, parallel={"zero_stage": zero}, training={"precision": precision}, optimizer={"lr": 1e-2}
    )
    result = world2.run(trained, recipe, tmp_path / "checkpoints")[0]
    opus_to_hf(tmp_path / "checkpoints/step_00000002", tmp_path / "exported", precision="fp32")
    got = hf_models.published_logits(tmp_path / "exported")
    # bf16: `transformers` computes with the same weights in float32
    torch.testing.assert_close(
        result["logits"][..., : hf_models.VOCAB], got, rtol=0, atol=TOLERANCE if precision == "fp32" else 0.3
    )
    assert (got - hf_models.published_logits(source)).abs().max() > 0.5
