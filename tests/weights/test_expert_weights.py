"""Mixtures of experts of `transformers` against ours, from the same weights, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from torch.nn import functional

from megatron_opus.backends.formats.hf_config import model_config, read_config
from megatron_opus.config import ConfigError
from megatron_opus.weights.convert import hf_to_opus, opus_to_hf

TOLERANCE = 1e-4  # as in test_hf_parity.py
MEGATRON = {"engine": "megatron", "expert_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank each": {},
    "EP 2": {"parallel": MEGATRON},
    "TP 2 x EP 2": {"parallel": {**MEGATRON, "tensor_model_parallel_size": 2, "sequence_parallel": True}},
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.save(tmp_path_factory.mktemp("hf") / "experts", "qwen3_moe", tied=request.param)


def recipe(directory: Path, layout: str) -> Any:
    return hf_models.recipe_for(directory, 1, **LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_started_from_published_weights_computes_the_same(world2: Any, model: Path, layout: str) -> None:
    """Fault: experts under another number, gate and up exchanged, a router that weighs all experts instead of the
    chosen ones: all train, none is the published model."""
    want = hf_models.published_logits(model)
    assert want.std() > 0.3  # of logits that are all alike, anything would agree
    ids = hf_models.tokens()
    losses = functional.cross_entropy(want[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    for result in world2.run(hf_models.our_logits, recipe(model, layout)):
        torch.testing.assert_close(result["logits"][..., : hf_models.VOCAB], want, rtol=0, atol=TOLERANCE)
        found = result["losses"]
        torch.testing.assert_close(found, losses[:, : found.shape[1]], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_round_trip_changes_no_bit(world2: Any, model: Path, tmp_path: Path, tp: int) -> None:
    """Fault: an expert that loses bits, rows or its number on the way."""
    hf_to_opus(model, tmp_path / "ours", tp_size=tp, make_vocab_size_divisible_by=32)
    opus_to_hf(tmp_path / "ours", tmp_path / "back")
    before, after = hf_models.raw_tensors(model), hf_models.raw_tensors(tmp_path / "back")
    assert set(before) == set(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    want = hf_models.published_logits(model)
    assert torch.equal(hf_models.published_logits(tmp_path / "back"), want)
    result = world2.run(hf_models.our_logits, recipe(model, "EP 2"), tmp_path / "ours")[0]
    torch.testing.assert_close(result["logits"][..., : hf_models.VOCAB], want, rtol=0, atol=TOLERANCE)
    (tmp_path / "ours/source_config.json").unlink()  # as after training from random weights: no config.json to go by
    opus_to_hf(tmp_path / "ours", tmp_path / "alone")
    assert torch.equal(hf_models.published_logits(tmp_path / "alone"), want)


@pytest.mark.parametrize(
    "changes", [{"mlp_only_layers": [0]}, {"norm_topk_prob": False}, {"decoder_sparse_step": 2}], ids=str
)
def test_what_is_computed_otherwise_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Guards against a model of which a part would silently be another."""
    hf_models.save(tmp_path / "model", "qwen3_moe")
    hf_models.edit_config(tmp_path / "model", **changes)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        model_config(read_config(tmp_path / "model"))
