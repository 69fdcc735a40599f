"""Hugging Face directories in which two places state one fact, or that are malformed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opus.backends.formats.hf_config import model_config, published_config, read_config
from megatron_opus.backends.formats.safetensors_files import INDEX, SINGLE, SafetensorsFiles, WeightFileError
from megatron_opus.config import ConfigError
from megatron_opus.weights.sources import HfWeights

TABLE = {"gpt2": "transformer.wte.weight", "qwen3": "model.embed_tokens.weight", "llama": "model.embed_tokens.weight"}


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / SINGLE)
    edit(tensors)
    save_file(tensors, directory / SINGLE, {"format": "pt"})


@pytest.mark.parametrize("kind", [*TABLE])
def test_a_tied_table_under_the_head_s_name_alone(tmp_path: Path, kind: str) -> None:
    """Guards against a whole tied model refused as incomplete: some exporters keep the head and drop the table."""
    source = hf_models.save(tmp_path / "hf", kind, tied=True)
    expected = HfWeights(source).whole("embedding.word_embeddings.weight")
    change(source, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(TABLE[kind])}))
    assert torch.equal(HfWeights(source).whole("embedding.word_embeddings.weight"), expected)


def test_rotary_frequencies_among_the_weights(tmp_path: Path) -> None:
    """Guards against an old file refused for a buffer that every implementation computes anew."""
    source = hf_models.save(tmp_path / "hf", "qwen3")
    change(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    HfWeights(source)


def test_one_rotary_base(tmp_path: Path) -> None:
    """Guards against the older of two keys winning (logits off by 3), and against null where a table may stand."""
    raw = read_config(hf_models.save(tmp_path / "hf", "qwen3"))
    assert model_config({**raw, "rope_theta": 10000}).rotary_base == 500
    model = model_config({**raw, "rope_theta": 10000, "rope_parameters": None})
    assert model.rotary_base == 10000
    for base in ({**raw, "rope_theta": 7, "rope_parameters": None}, {**raw, "rope_theta": 7}):
        out = published_config(model, "float32", base)
        assert "rope_theta" not in out
        assert out["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000}
    with pytest.raises(ConfigError, match="rope_parameters: expected keys and values"):
        model_config({**raw, "rope_parameters": [1]})


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 100_000, b"null", b"[1]", b'{"model_type": []}', b'{"model_type": null}']
)
def test_a_malformed_config_is_refused(tmp_path: Path, content: bytes) -> None:
    """Guards against tracebacks of the JSON reader and of look-ups with what cannot be a key."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("qwen3", {"num_hidden_layers": "2"}, "num_hidden_layers: expected a positive whole number, got '2'"),
        ("qwen3", {"hidden_size": True}, "hidden_size: expected a positive whole number, got True"),
        ("qwen3", {"vocab_size": 10**30}, "vocab_size: expected a positive whole number"),
        ("qwen3", {"head_dim": None}, "missing key head_dim"),  # transformers refuses it, too
        ("qwen3", {"head_dim": 12.5}, "head_dim: expected a positive whole number, got 12.5"),
        ("qwen3", {"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number above 0 and at most 1, got '1e-5'"),
        ("qwen3", {"rms_norm_eps": None}, "rms_norm_eps: expected a number above 0"),
        ("qwen3", {"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, got 'false'"),
        ("qwen3", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta: expected a positive whole number, got 'x'"),
        ("qwen3", {"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta: expected a positive whole number"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 5}}}, "rope scaling: expected none"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "layer_types: expected full_attention alone"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: expected None"),
        ("gpt2", {"layer_norm_epsilon": None}, "layer_norm_epsilon: expected a number above 0"),
        ("gpt2", {"n_inner": [1]}, r"n_inner: expected a positive whole number, got \[1\]"),
        ("gpt2", {"hidden_size": 48}, "n_embd is 32, and hidden_size, which means the same, is 48"),
        ("gpt2", {"num_attention_heads": 8}, "n_head is 4, and num_attention_heads, which means the same, is 8"),
        ("gpt2", {"head_dim": 16}, "head_dim: GPT-2 has n_embd / n_head numbers per head, 8, got 16"),
    ],
)
def test_numbers_are_numbers_and_said_once(tmp_path: Path, kind: str, values: dict[str, object], said: str) -> None:
    """Guards against tracebacks for values of another type, "false" that counts as true, and head dimensions that two
    keys state differently, of which `transformers` may take the other one."""
    raw = read_config(hf_models.save(tmp_path / "hf", kind))
    with pytest.raises(ConfigError, match=rf"config\.json: {said}"):
        model_config({**raw, **values})


def test_a_folder_for_a_config_is_refused(tmp_path: Path) -> None:
    """Guards against IsADirectoryError."""
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="expected a file, found a folder"):
        read_config(tmp_path)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", ""])
def test_an_index_names_files_beside_it(tmp_path: Path, file: str) -> None:
    """Guards against an index that makes a conversion read files outside of the directory that was named."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a.weight": file}}))
    with pytest.raises(WeightFileError, match=r"weight_map\.a\.weight: expected the name of a file beside it"):
        SafetensorsFiles(tmp_path)


@pytest.mark.parametrize("content", ["{}", "null", "[]", '{"weight_map": null}', '{"weight_map": [1]}', "[" * 100_000])
def test_a_malformed_index_is_refused(tmp_path: Path, content: str) -> None:
    """Guards against tracebacks for an index of another shape."""
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(WeightFileError, match="expected JSON with a weight_map"):
        SafetensorsFiles(tmp_path)


def test_a_single_file_beside_shards(tmp_path: Path) -> None:
    """Guards against other weights than those that transformers reads where both kinds of file are there."""
    for name, value in ((SINGLE, 1.0), ("shard.safetensors", 2.0)):
        save_file({"a": torch.full((2,), value)}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}))
    assert SafetensorsFiles(tmp_path).read("a").tolist() == [1.0, 1.0]
    (tmp_path / SINGLE).unlink()
    assert SafetensorsFiles(tmp_path).read("a").tolist() == [2.0, 2.0]
