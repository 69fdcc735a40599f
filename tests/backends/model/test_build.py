from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_runs import GPT2, QWEN3, recipe

from megatron_opus import config as configs
from megatron_opus.backends.model.build import resolve
from megatron_opus.config import ConfigError, DataConfig, ModelConfig, ParallelConfig
from megatron_opus.config.dimensions import tensor_parallel_degrees
from megatron_opus.layout.model_layout import model_layout

PRESETS = Path(__file__).parents[3] / "configs" / "models"
# Sizes of the released checkpoints: 12, 24, 36 and 48 layers.
PUBLISHED = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}


def preset(name: str) -> ModelConfig:
    raw = configs.load(PRESETS / f"gpt2_{name}.yaml", ["name=preset"])
    return raw.model


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size(name: str) -> None:
    """25 heads typed as 24, a forgotten position table: another model under the name of GPT-2 XL."""
    model = preset(name)
    assert model_layout(model).published_size() == PUBLISHED[name]
    padding = (50304 - 50257) * model.hidden_size
    assert model_layout(model).local_size() == PUBLISHED[name] + padding


def built_shapes(models: dict[str, ModelConfig], tp: int) -> dict[str, Any]:
    """Parameters as Megatron builds them, without memory."""
    from megatron_opus.backends.model.gpt import build_gpt
    from megatron_opus.backends.model.parallel import init_parallel

    init_parallel(ParallelConfig(tensor_model_parallel_size=tp))
    found = {}
    for name, model in models.items():
        gpt = build_gpt(model, seq_length=model.max_position_embeddings or 16, device="meta")
        assert all(p.device.type == "meta" for p in gpt.parameters())
        found[name] = {n: tuple(p.shape) for n, p in gpt.named_parameters()}
    return found


def test_shapes_are_those_of_the_built_model(world2: Any) -> None:
    """The count is arithmetic; the model is Megatron's. They agree for every preset and every switch."""
    models = {name: preset(name) for name in PUBLISHED}
    models |= {
        "gpt2": dataclasses.replace(GPT2, max_position_embeddings=16),
        "qwen3": QWEN3,
        "no_bias": dataclasses.replace(
            GPT2, max_position_embeddings=16, add_bias_linear=False, untie_embeddings_and_output_weights=True
        ),
    }
    for name, shapes in world2.run(built_shapes, models, 1)[0].items():
        assert shapes == {p.name: p.shape for p in model_layout(models[name]).parameters}, name
    del models["xl"]  # 25 heads
    for name, shapes in world2.run(built_shapes, models, 2)[0].items():
        numel = sum(torch.Size(s).numel() for s in shapes.values())
        assert numel == model_layout(models[name], tp_size=2).local_size(), name


def test_tiny_preset_takes_the_tokenizers_vocabulary() -> None:
    """A vocabulary fixed in the preset and another tokenizer: ids out of range, or thousands of dead rows."""
    config = configs.load(PRESETS / "gpt2_tiny.yaml", ["name=preset", "data.seq_length=256"])
    resolved = resolve(config, 8000)
    assert (resolved.model.vocab_size, resolved.model.max_position_embeddings) == (8000, 256)
    assert {1, 2, 4} <= set(tensor_parallel_degrees(resolved.model))


def test_vocabulary_smaller_than_the_tokenizers() -> None:
    """Token ids beyond the table raise on a CPU and end the process on a GPU."""
    with pytest.raises(ConfigError, match=r"model\.vocab_size: expected at least the tokenizer's 200 tokens, got 91"):
        resolve(recipe(), 200)
    assert resolve(recipe(), 50).model.vocab_size == 91


def test_rotary_positions_that_restart() -> None:
    """Megatron's rotary embedding takes no position ids: restarting them would be ignored without a word."""
    config = dataclasses.replace(recipe(model=QWEN3), data=DataConfig(reset_position_ids=True))
    with pytest.raises(ConfigError, match=r"data\.reset_position_ids"):
        resolve(config, 50)
    masked = DataConfig(reset_position_ids=True, reset_attention_mask=True)
    assert resolve(dataclasses.replace(config, data=masked), 50).data is masked
