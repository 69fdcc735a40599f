"""Conversion: what it refuses and in which words, what it leaves behind, and how much memory it takes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
from safetensors.torch import save_file

from megatron_opus import config as configs
from megatron_opus.backends.formats.hf_config import family, model_config, published_config
from megatron_opus.backends.formats.hf_layout import layouts, published_shapes
from megatron_opus.backends.formats.safetensors_files import SafetensorsFiles
from megatron_opus.config import ConfigError
from megatron_opus.layout.model_layout import model_layout
from megatron_opus.weights.convert import hf_to_opus, opus_to_hf
from megatron_opus.weights.sources import intersections, open_weights

ROOT = Path(__file__).resolve().parents[2]
# Released models: parameters, and the shape in their config.json (the keys of transformers 4, as published).
PUBLISHED = {
    "qwen3_0.6b": (596_049_920, (28, 1024, 16, 3072, True)),
    "qwen3_1.7b": (1_720_574_976, (28, 2048, 16, 6144, True)),
    "qwen3_4b": (4_022_468_096, (36, 2560, 32, 9728, True)),
    "qwen3_8b": (8_190_735_360, (36, 4096, 32, 12288, False)),
}


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = hf_models.raw_tensors(directory)
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name: str) -> None:
    """Fault: a preset with one number of another size, which no checkpoint of that name fits."""
    parameters, (layers, hidden, heads, ffn, tied) = PUBLISHED[name]
    preset = configs.load(ROOT / f"configs/models/{name}.yaml", ["name=preset"]).model
    assert model_layout(preset).published_size() == parameters
    raw = {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": 40960,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    assert model_config(raw) == preset
    assert raw.items() <= {**raw, **published_config(preset, "bfloat16", raw)}.items()


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_every_row_has_one_place(kind: str) -> None:
    """Fault: two parameters read from the same rows, or rows that nobody reads."""
    model = model_config(hf_models.config(kind, False).to_dict())
    ours = model_layout(model)
    placed = layouts(model, ours)
    taken: dict[str, list[tuple[int, int]]] = {}
    for layout in placed.values():
        for piece in layout.pieces:
            taken.setdefault(piece.tensor, []).append((piece.start, piece.length))
    for tensor, (shape, transposed) in published_shapes(placed, ours).items():
        at = 0
        for start, length in sorted(taken[tensor]):
            assert start == at
            at += length
        assert at == shape[-1 if transposed else 0]


def test_intersections() -> None:
    """Fault: an offset into the whole taken for one into the shard, which two-range shards (gate, up) show."""
    assert intersections(((2, 6),), ((0, 4), (6, 4))) == [(0, 2, 2), (4, 4, 2)]
    assert intersections(((0, 2), (8, 2)), ((8, 4),)) == [(2, 0, 2)]
    assert intersections(((0, 2),), ((2, 2),)) == []


# --- what is refused ------------------------------------------------------------------------------------------------


def drop(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("model.layers.1.self_attn.k_norm.weight")


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(3)


def cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:31]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (drop, "missing model.layers.1.self_attn.k_norm.weight: expected [12]"),
        (add, "unexpected model.layers.0.mlp.extra.weight: got [3]"),
        (cut, "model.norm.weight: expected [32], got [31]"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path: Path, edit: Any, expected: str) -> None:
    """Fault: a model of another version converted as far as it goes, its new parts dropped or left random."""
    source = change(hf_models.save(tmp_path / "hf", "qwen3"), edit)
    with pytest.raises(ConfigError) as caught:
        hf_to_opus(source, tmp_path / "ours")
    assert expected in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    """Fault: an interrupted download, of which the header is whole and the last tensors are zeros or nothing."""
    source = hf_models.save(tmp_path / "hf", "qwen3")
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(ConfigError, match=r"model\.safetensors: \d+ bytes are not a whole safetensors file"):
        hf_to_opus(source, tmp_path / "ours")
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        open_weights(source)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """Fault: a download without one of its files, or an index of another one."""
    source = hf_models.save(tmp_path / "hf", "qwen3", max_shard_size="20KB")
    victim = sorted(source.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ConfigError, match=rf"{victim.name}: no such file"):
        hf_to_opus(source, tmp_path / "ours")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != victim.name}
    index["weight_map"]["model.ghost"] = next(iter(index["weight_map"].values()))
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"names tensors that are not there: model\.ghost"):
        hf_to_opus(source, tmp_path / "ours")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    """Fault: an old download ends in `no such file`, with no word about what to do."""
    source = hf_models.save(tmp_path / "hf", "gpt2")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        hf_to_opus(source, tmp_path / "ours")


def test_a_degree_that_does_not_divide_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """Fault: the refusal comes after the download, or after an hour of reading."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(hf_models.config("qwen3", True).to_json_string())
    with pytest.raises(ConfigError, match=r"tensor_model_parallel_size: 8 does not divide .*possible: 1, 2, 4"):
        hf_to_opus(tmp_path / "hf", tmp_path / "ours", tp_size=8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "mistral"}, "model_type: expected one of gpt2, qwen3, qwen3_moe, llama, got 'mistral'"),
        ({"mlp_bias": True}, "mlp_bias: expected False, got True"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        ({"use_sliding_window": True}, "use_sliding_window: expected False, got True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope scaling: expected none"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, got 'gelu'"),
        ({"vocab_size": None}, "missing key vocab_size"),
    ],
)
def test_a_variant_that_is_not_computed_here_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    """Fault: the shapes fit, and the model computes something else."""
    source = hf_models.save(tmp_path / "hf", "qwen3")
    hf_models.edit_config(source, **changes)
    with pytest.raises(ConfigError) as caught:
        hf_to_opus(source, tmp_path / "ours")
    assert expected in str(caught.value)


def test_a_model_without_published_architecture_is_refused(tmp_path: Path) -> None:
    """Fault: a GPT-2 with rotary positions written out under a config.json that knows none."""
    hf_to_opus(hf_models.save(tmp_path / "hf", "gpt2"), tmp_path / "ours")
    marker = tmp_path / "ours/weights.json"
    raw = json.loads(marker.read_text())
    with pytest.raises(ConfigError, match=r"as gpt2: model\.position_embedding_type: expected learned_absolute"):
        family(configs.ModelConfig(**{**raw["model"], "position_embedding_type": "rope"}))
    marker.write_text(json.dumps({**raw, "model": {**raw["model"], "num_layers": 3}}))
    with pytest.raises(ConfigError, match=r"tensor-parallel rank 0 of 1:\n  missing decoder\.layers\.2"):
        opus_to_hf(tmp_path / "ours", tmp_path / "back")


# --- other ways in which published files are written ----------------------------------------------------------------


def test_old_gpt2_files(tmp_path: Path) -> None:
    """Fault: the released GPT-2 has no `transformer.` before its names and carries its causal masks as tensors."""
    source = hf_models.save(tmp_path / "hf", "gpt2")
    want = hf_models.raw_tensors(source)

    def old(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
        tensors["h.0.attn.masked_bias"] = torch.tensor([-1e4])

    hf_to_opus(change(source, old), tmp_path / "ours", tp_size=2)
    opus_to_hf(tmp_path / "ours", tmp_path / "back")
    got = hf_models.raw_tensors(tmp_path / "back")
    assert set(got) == set(want)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_a_tied_matrix_that_is_stored_twice(tmp_path: Path) -> None:
    """Fault: Qwen3-0.6B stores its shared matrix twice; a second one that differs is dropped without a word."""
    source = hf_models.save(tmp_path / "hf", "qwen3", tied=True)
    change(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    hf_to_opus(source, tmp_path / "ours")
    change(source, lambda t: t["lm_head.weight"][90].add_(1))
    with pytest.raises(ConfigError, match=r"tie_word_embeddings is true, but lm_head\.weight"):
        hf_to_opus(source, tmp_path / "other")


def test_the_padding_of_the_vocabulary(tmp_path: Path) -> None:
    """Fault: padding rows exported as tokens, or left as whatever was in memory; another multiple refused."""
    source = hf_models.save(tmp_path / "hf", "qwen3", tied=False)
    hf_to_opus(source, tmp_path / "ours", tp_size=2, make_vocab_size_divisible_by=128)
    shard = SafetensorsFiles(tmp_path / "ours", ["tp_01_of_02.safetensors"]).read("output_layer.weight")
    real = hf_models.VOCAB - 64
    assert shard.shape == (64, 32)
    assert torch.equal(shard[:real], hf_models.raw_tensors(source)["lm_head.weight"][64:])
    assert not shard[real:].any()
    weights = open_weights(tmp_path / "ours")
    assert torch.equal(
        weights.read("output_layer.weight", ((60, 100),), None)[:4], weights.whole("output_layer.weight")[60:64]
    )
    assert not weights.read("output_layer.weight", ((140, 20),), ((0, 32),)).any()  # for a larger multiple
    opus_to_hf(tmp_path / "ours", tmp_path / "back")
    assert hf_models.raw_tensors(tmp_path / "back")["lm_head.weight"].shape == (hf_models.VOCAB, 32)


# --- directories ----------------------------------------------------------------------------------------------------


def test_an_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    """Fault: a mistyped --output destroys a model, or --overwrite a home folder."""
    source = hf_models.save(tmp_path / "hf", "qwen3")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("years of work")
    for overwrite, what in ((False, "exists; choose another output"), (True, "is not a converted model")):
        with pytest.raises(ConfigError, match=what):
            hf_to_opus(source, tmp_path / "notes", overwrite=overwrite)
    hf_to_opus(source, tmp_path / "ours", tp_size=1)
    with pytest.raises(ConfigError, match="exists"):
        hf_to_opus(source, tmp_path / "ours", tp_size=2)
    hf_to_opus(source, tmp_path / "ours", tp_size=2, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "ours").glob("tp_*")) == [
        "tp_00_of_02.safetensors",
        "tp_01_of_02.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "notes", "ours"]


def test_a_failed_conversion_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: half a model under the name of a whole one, or the old one gone before the new one is there."""
    source = hf_models.save(tmp_path / "hf", "qwen3")
    hf_to_opus(source, tmp_path / "ours")
    before = {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()}
    read, calls = SafetensorsFiles.read, []

    def failing(self: Any, name: str, *ranges: Any) -> Any:
        calls.append(name)
        if len(calls) > 20:
            raise OSError("disk full")
        return read(self, name, *ranges)

    monkeypatch.setattr(SafetensorsFiles, "read", failing)
    with pytest.raises(OSError, match="disk full"):
        hf_to_opus(source, tmp_path / "ours", tp_size=2, overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]


def test_companions_travel(tmp_path: Path) -> None:
    """Fault: an exported model without its tokenizer or its end-of-text id, which nothing can be generated with."""
    source = hf_models.save(tmp_path / "hf", "qwen3")
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("not ours")
    hf_to_opus(source, tmp_path / "ours")
    done = opus_to_hf(tmp_path / "ours", tmp_path / "back", precision="bf16")
    assert {"tokenizer.json", "generation_config.json"} == set(done.companions)
    raw = json.loads((tmp_path / "back/config.json").read_text())
    assert (raw["eos_token_id"], raw["torch_dtype"], raw["rope_parameters"]["rope_theta"]) == (2, "bfloat16", 500)
    assert {t.dtype for t in hf_models.raw_tensors(tmp_path / "back").values()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="expected tokenizer files, found none"):
        opus_to_hf(tmp_path / "ours", tmp_path / "again", tokenizer=tmp_path)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: hours of writing that end in `No space left on device`."""
    source = hf_models.save(tmp_path / "hf", "gpt2")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"GB of free space for the weights, found 0\.00 GB on the disk"):
        opus_to_hf(source, tmp_path / "new/back")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_weights_that_are_not_numbers_are_refused(world2: Any, tmp_path: Path) -> None:
    """Fault: a diverged or damaged model trained on for hours before somebody sees the loss."""
    source = hf_models.save(tmp_path / "hf", "qwen3")
    change(source, lambda t: t["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan")))
    said = world2.run(load_error, hf_models.recipe_for(source, 2))
    assert all("decoder.layers.1.mlp.linear_fc1.weight holds NaN or Inf" in text for text in said), said


def load_error(recipe: Any) -> str:
    try:
        hf_models.our_logits(recipe)
    except ConfigError as error:
        return str(error)
    return ""


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
from megatron_opus.weights.convert import hf_to_opus, opus_to_hf

def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024

def added(convert, *arguments, **options):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    convert(*map(Path, arguments), **options)
    return status("VmHWM") - before

source, work = sys.argv[1:]
print(json.dumps([added(hf_to_opus, source, work + "/ours", tp_size=2),
                  added(opus_to_hf, work + "/ours", work + "/back", max_shard_bytes=50_000_000)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    """Fault: a whole model in memory, by reading it or by mappings whose pages stay. 220 MB, at most 12 MB each.

    Up to 24 MB are mapped at a time, a parameter and its copy in another order come on top: measured 60 to 80 MB, for
    the allocator does not give back at once. Half of the model leaves room for that.
    """
    shape = {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 10, "head_dim": 64}
    source = hf_models.save(tmp_path / "hf", "qwen3", **shape)
    total = (source / "model.safetensors").stat().st_size
    assert total > 210e6
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for peak in json.loads(done.stdout.splitlines()[-1]):
        assert peak < total / 2, f"{peak / 1e6:.0f} MB for {total / 1e6:.0f} MB of weights"


def test_the_sharded_model_names_its_shape(tmp_path: Path) -> None:
    """Fault: weights that can only be used by those who remember how they were made."""
    hf_to_opus(hf_models.save(tmp_path / "hf", "gpt2"), tmp_path / "ours", make_vocab_size_divisible_by=32)
    model = open_weights(tmp_path / "ours").model
    assert model == dataclasses.replace(hf_models.recipe_for(tmp_path / "hf", 1).model, init_from=None)
