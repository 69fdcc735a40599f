"""Continued pre-training of a small Qwen3, end to end: published weights, a run with OPUS, an export, and back."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch

from megatron_opus import config as configs
from megatron_opus.config import RunConfig
from megatron_opus.data.prepare.embedded import prepare_embedded
from megatron_opus.weights.convert import opus_to_hf

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 for the embedded corpus's tokenizer, with a few ids more, as the published ones have."""
    from megatron_opus.backends.formats import indexed
    from megatron_opus.data import manifest

    data = prepare_embedded(embedded_cache, indexed, progress=False)
    vocabulary = int(manifest.read(data).tokenizer["vocab_size"])
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6}
    directory = hf_models.save(
        tmp_path_factory.mktemp("hf") / "qwen3", "qwen3", tied=False, vocab_size=vocabulary + 3, **theta
    )
    (directory / "tokenizer.json").write_text("{}")
    return directory


def recipe(model: Path, cache: Path, output: Path, *overrides: str) -> RunConfig:
    import json

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    return configs.load(
        ROOT / "configs/cpt_qwen3_tiny.yaml",
        [
            f"model.init_from={model}",
            f"model.vocab_size={vocabulary}",
            f"data.cache_dir={cache}",
            f"output_dir={output}",
            *overrides,
        ],
    )


def run(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """A whole run on this rank; what the start said, the losses, and what the model computes at the end."""
    import torch.distributed as dist

    from megatron_opus.backends.model.gpt import forward_loss
    from megatron_opus.runs.metrics import read_metrics
    from megatron_opus.training.session import Session
    from megatron_opus.types import Batch

    said: list[str] = []
    session = Session(config, resume=resume, versions={}, say=said.append)
    session.train()
    model = session.engine.module.eval()
    from megatron_opus.backends.model.parallel import megatron_groups

    rows = read_metrics(session.run_dir)
    computed = hf_models.logits_of(model, megatron_groups(), dist, forward_loss, Batch)
    return {**computed, "said": said, "losses": [r["loss"] for r in rows], "row": rows[-1]}


@pytest.fixture(scope="module")
def trained(
    world2: Any, model: Path, embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs")
    config = recipe(model, embedded_cache, output, "parallel.tensor_model_parallel_size=2")
    return output / config.name, world2.run(run, config)[0]


def test_the_miniature_twin_runs_from_published_weights_to_published_weights(
    trained: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """Fault: any link of the chain: weights not loaded, the export of another step, a config.json of another model."""
    folder, result = trained
    assert any(f"initial weights: {model}" in line for line in result["said"])
    assert result["row"]["geometry"].startswith("adamw")
    assert result["row"]["fallbacks"] == 0
    done = opus_to_hf(folder, tmp_path / "exported")
    want = result["logits"][..., : hf_models.published_logits(model).shape[-1]]
    got = hf_models.published_logits(tmp_path / "exported")
    torch.testing.assert_close(want, got, rtol=0, atol=1e-4)
    start = hf_models.published_logits(model)
    assert (got - start).abs().max() > 0.01  # six steps further
    assert torch.corrcoef(torch.stack([got.flatten(), start.flatten()]))[0, 1] > 0.9  # from there, not from anywhere
    assert done.companions == ("tokenizer.json", "generation_config.json")


def test_a_run_of_megatrons_engine_goes_the_same_way(
    world2: Any, model: Path, embedded_cache: Path, tmp_path: Path
) -> None:
    """Guards against a checkpoint of that engine that cannot be exported, or started from at another degree."""
    keys = ("parallel.engine=megatron", "parallel.tensor_model_parallel_size=2")
    config = recipe(model, embedded_cache, tmp_path, *keys)
    result = world2.run(run, config)[0]
    folder = tmp_path / config.name
    opus_to_hf(folder, tmp_path / "exported")
    got = hf_models.published_logits(tmp_path / "exported")
    torch.testing.assert_close(result["logits"][..., : got.shape[-1]], got, rtol=0, atol=1e-4)
    keys = ("parallel.engine=megatron", f"model.init_from={folder}", "optimizer.lr=1e-12")
    again = recipe(model, embedded_cache, tmp_path / "again", *keys)
    started = world2.run(run, again)[0]
    torch.testing.assert_close(started["logits"], result["logits"], rtol=0, atol=1e-4)


def test_recomputation_does_not_disturb_scoring(
    world2: Any, trained: tuple[Path, dict[str, Any]], model: Path, embedded_cache: Path, tmp_path: Path
) -> None:
    """Fault: a scored layer that is seen twice, or not at all, because its forward pass is run again in backward."""
    without = recipe(
        model, embedded_cache, tmp_path, "parallel.tensor_model_parallel_size=2", "training.recompute=none"
    )
    result = world2.run(run, without)[0]
    assert result["losses"] == trained[1]["losses"]
    assert torch.equal(result["logits"], trained[1]["logits"])


def test_a_resumed_run_does_not_need_its_initial_weights(
    world2: Any, trained: tuple[Path, dict[str, Any]], model: Path, embedded_cache: Path, tmp_path: Path
) -> None:
    """Fault: 16 GB read by every rank at each restart, only to be overwritten by the checkpoint."""
    source = shutil.copytree(model, tmp_path / "weights")
    layout = ["parallel.tensor_model_parallel_size=2", "training.checkpoint_interval=3", "optimizer.lr_decay_steps=6"]
    config = recipe(source, embedded_cache, tmp_path, *layout)
    world2.run(run, recipe(source, embedded_cache, tmp_path, *layout, "training.train_steps=3"))
    shutil.rmtree(source)
    result = world2.run(run, config, True)[0]
    assert not any("initial weights" in line for line in result["said"])
    assert result["losses"] == trained[1]["losses"]


def refusal(config: RunConfig) -> str:
    try:
        run(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.init_from=nowhere", "nowhere: expected a Hugging Face model (config.json)"),
        ("model.vocab_size=null", "model.vocab_size: expected"),
        ("model.rotary_base=10000", "model.rotary_base: expected 1000000, got 10000"),
        ("model.layernorm_epsilon=1e-5", "model.layernorm_epsilon: expected 1e-06, got 1e-05"),
        ("model.ffn_hidden_size=64", "model.ffn_hidden_size: expected 48, got 64"),
    ],
)
def test_weights_of_another_model_are_refused_on_every_rank(
    world2: Any, model: Path, embedded_cache: Path, tmp_path: Path, override: str, expected: str
) -> None:
    """Fault: a rotary base or an epsilon that differs gives no shape error, only a worse model."""
    said = world2.run(refusal, recipe(model, embedded_cache, tmp_path, override))
    assert all(text.startswith("WeightsError") and expected in text for text in said), said
    assert not list(tmp_path.iterdir())


def read_by_ranks(config: RunConfig, other: str) -> str:
    """Rank 1 sees another directory under the same name."""
    import torch.distributed as dist

    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.model.build import build_model
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.weights.initial_weights import load_initial_weights

    init_distributed(config.parallel)
    groups = init_parallel(config.parallel)
    if dist.get_rank() == 1:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, init_from=other))
    try:
        load_initial_weights(build_model(config), config, groups)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_that_read_other_weights_are_named(world2: Any, tmp_path: Path, tp: int) -> None:
    """Fault: one node with an older copy of the weights trains with the others, and its replicas never meet again."""
    one = hf_models.save(tmp_path / "one", "qwen3", seed=0)
    two = hf_models.save(tmp_path / "two", "qwen3", seed=1)
    config = hf_models.recipe_for(one, tp)
    said = world2.run(read_by_ranks, config, str(two))
    assert all("RankMismatch: initial weights: rank 1 has read another" in text for text in said), said
    said = world2.run(read_by_ranks, config, str(tmp_path / "absent"))
    assert all("WeightsError" in text and "absent: expected a Hugging Face model" in text for text in said), said
