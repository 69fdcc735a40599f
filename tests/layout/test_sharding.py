from __future__ import annotations

import dataclasses

import pytest
import torch
from gpt_runs import GPT2, QWEN3

from megatron_opus.config import ConfigError, ModelConfig
from megatron_opus.config.dimensions import check_tensor_parallel, padded_vocab_size, tensor_parallel_degrees
from megatron_opus.layout.model_layout import model_layout

LAYER = "decoder.layers.0."
MATRICES = [
    f"{LAYER}self_attention.linear_qkv.weight",
    f"{LAYER}self_attention.linear_proj.weight",
    f"{LAYER}mlp.linear_fc1.weight",
    f"{LAYER}mlp.linear_fc2.weight",
    "embedding.word_embeddings.weight",
    "output_layer.weight",
]
UNTIED = dataclasses.replace(GPT2, untie_embeddings_and_output_weights=True)
XL = ModelConfig(num_layers=48, hidden_size=1600, num_attention_heads=25, vocab_size=50257)


@pytest.mark.parametrize("config", [UNTIED, QWEN3], ids=["gpt2", "qwen3"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MATRICES)
def test_pieces_tile_the_matrix(config: ModelConfig, tp: int, name: str) -> None:
    """A row counted twice or not at all biases every sketch, and no shape check sees it."""
    layout = model_layout(config, tp_size=tp, positions=16)
    seen = torch.zeros(layout[name].shape, dtype=torch.int)
    for rank in range(tp):
        rows, columns = layout.shard(name, rank)
        for r, n in rows:
            for c, m in columns:
                seen[r : r + n, c : c + m] += 1
    assert (seen == 1).all()


def test_swiglu_cuts_gate_and_up() -> None:
    """One contiguous range would give rank 0 all gates and rank 1 all ups."""
    layout = model_layout(QWEN3, tp_size=2)
    rows, _ = layout.shard(f"{LAYER}mlp.linear_fc1.weight", 1)
    assert layout[f"{LAYER}mlp.linear_fc1.weight"].shape == (96, 32)
    assert rows == ((24, 24), (72, 24))


def test_names() -> None:
    """A bias of a row-parallel layer is replicated; counted as a shard it enters the gradient norm tp times."""
    layout = model_layout(GPT2, positions=16)
    assert layout[f"{LAYER}mlp.linear_fc1.bias"].cut
    assert layout[f"{LAYER}mlp.linear_fc2.weight"].cut
    assert not layout[f"{LAYER}mlp.linear_fc2.bias"].cut
    assert not layout["embedding.position_embeddings.weight"].cut
    with pytest.raises(KeyError, match="position_embeddings"):
        model_layout(QWEN3).shard("embedding.position_embeddings.weight", 0)


def test_possible_degrees_are_named() -> None:
    """GPT-2 XL has 25 heads: `must be divisible` leaves the user guessing which degree is."""
    assert tensor_parallel_degrees(XL) == [1]
    assert tensor_parallel_degrees(dataclasses.replace(XL, make_vocab_size_divisible_by=640)) == [1, 5]
    assert tensor_parallel_degrees(ModelConfig(num_layers=1, hidden_size=1280, num_attention_heads=20)) == [1, 2, 4]
    with pytest.raises(ConfigError, match=r"2 does not divide this model .*possible: 1$"):
        check_tensor_parallel(XL, 2)


def test_vocabulary_is_padded_alike_for_every_degree() -> None:
    """Padding to a multiple of tp, as is usual, gives another softmax for every degree."""
    assert padded_vocab_size(XL) == 50304
    assert model_layout(XL, positions=16)["embedding.word_embeddings.weight"].shape == (50304, 1600)
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        padded_vocab_size(dataclasses.replace(XL, vocab_size=None))
