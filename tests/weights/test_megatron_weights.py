"""Weights read out of the checkpoints of Megatron's engine: any layout, no process, no code."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_runs import GPT2, QWEN3, recipe, start, steps

from megatron_opus.backends.formats.torch_dist import TorchDistTensors
from megatron_opus.errors import CheckpointError

MODELS = {
    "gpt2": dataclasses.replace(GPT2, num_layers=8),
    "qwen3": dataclasses.replace(QWEN3, num_layers=8),
}
# (processes, what the recipe says)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP 2, overlaps": (2, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "TP 2, replicated": (2, {"tp": 2, "parallel": {"use_distributed_optimizer": False}}),
    "PP 2, bf16": (2, {"parallel": {"pipeline_model_parallel_size": 2}, "precision": "bf16"}),
    "TP 2 x PP 2": (4, {"tp": 2, "sp": True, "parallel": {"pipeline_model_parallel_size": 2}}),
    "PP 4, interleaved": (
        4,
        {"parallel": {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}},
    ),
}


def write(path: Path, model: str, arguments: dict[str, Any]) -> list[tuple[str, Any, torch.Tensor]]:
    """Train a step, save, and return each parameter of this rank with its place in the whole one."""
    from megatron_opus.backends.model.stages import named_parameters
    from megatron_opus.layout.model_layout import recipe_layout

    arguments = {**arguments, "parallel": {"engine": "megatron", **arguments["parallel"]}}
    config = recipe(model=MODELS[model], micro_batch_size=1, **arguments)
    engine, groups = start(config)
    steps(engine, groups, 0, 1, 1)
    engine.save(path)
    layout = recipe_layout(config)
    with engine._gathered():
        return [
            (name, layout.shard(name, groups.tp_rank), p.detach().clone())
            for name, p in named_parameters(engine.module)
        ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_of_every_layout(world2: Any, world4: Any, tmp_path: Path, layout: str, model: str) -> None:
    """Guards against layers stacked in another order, norms under Megatron's names of them, gate and up mixed, chunks
    of other ranks left out, and weights that were not gathered before they were saved."""
    world, arguments = LAYOUTS[layout]
    ranks = (world2 if world == 2 else world4).run(write, tmp_path, model, arguments)
    tensors = TorchDistTensors(tmp_path / "engine")
    seen = set()
    for held in ranks:
        for name, shard, value in held:
            assert tensors.dtype(name) == value.dtype
            assert torch.equal(tensors.read(name, *shard), value), name
            seen.add(name)
    assert len([name for name in seen if ".mlp.linear_fc2.weight" in name]) == 8
    assert tensors.shape("decoder.layers.8.mlp.linear_fc2.weight") is None
    row = tensors.read("embedding.word_embeddings.weight", ((5, 1), (90, 2)), ((3, 4),))
    whole = tensors.read("embedding.word_embeddings.weight")
    assert torch.equal(row, torch.cat([whole[5:6, 3:7], whole[90:92, 3:7]]))


class Bomb:
    def __reduce__(self) -> Any:
        return print, ("code has run",)


def test_nothing_in_them_is_run(world2: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a pickle that runs code when a checkpoint is converted: its metadata, and one of its chunks."""
    world2.run(write, tmp_path, "qwen3", LAYOUTS["TP 2, replicated"][1])
    engine = tmp_path / "engine"
    name = "decoder.final_layernorm.weight"
    tensors = TorchDistTensors(engine)
    tensors.read(name)
    place = tensors._places[name, (0,)]
    file, bomb = engine / place.relative_path, pickle.dumps(Bomb())
    content = bytearray(file.read_bytes())
    content[place.offset : place.offset + place.length] = bomb.ljust(place.length, b".")
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        tensors.read(name)
    (engine / ".metadata").write_bytes(bomb)
    with pytest.raises(CheckpointError, match="print, which could run code"):
        TorchDistTensors(engine)
    assert "code has run" not in capsys.readouterr().out


def test_a_lost_file_is_named(world2: Any, tmp_path: Path) -> None:
    """Guards against numbers from uninitialised memory where a rank's file was not copied."""
    world2.run(write, tmp_path, "gpt2", LAYOUTS["TP 2, replicated"][1])
    (tmp_path / "engine/__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp"):
        TorchDistTensors(tmp_path / "engine").read("decoder.layers.3.mlp.linear_fc1.weight")
