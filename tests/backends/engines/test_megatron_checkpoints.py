"""Checkpoints of Megatron's engine: exact resume, on another number of data-parallel ranks too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from gpt_runs import GPT2, recipe, start, steps
from megatron_muon import KINDS as MUON
from megatron_muon import needs_muon

FIRST, LAST = 2, 5
KINDS: dict[str, dict[str, Any]] = {
    "replicated": {"parallel": {"engine": "megatron", "use_distributed_optimizer": False}},
    "distributed": {"parallel": {"engine": "megatron"}},
    "overlaps": {"parallel": {"engine": "megatron", "overlap_grad_reduce": True, "overlap_param_gather": True}},
    "distributed, bf16": {"parallel": {"engine": "megatron"}, "precision": "bf16"},
    "replicated, bf16": {"parallel": {"engine": "megatron", "use_distributed_optimizer": False}, "precision": "bf16"},
    "SGD": {"parallel": {"engine": "megatron", "use_distributed_optimizer": False}, "optimizer": "sgd"},
    "TP 2": {"parallel": {"engine": "megatron"}, "tp": 2, "sp": True},
    "PP 2": {
        "parallel": {"engine": "megatron", "pipeline_model_parallel_size": 2},
        "model": dataclasses.replace(GPT2, num_layers=4),
    },
}


def train(arguments: dict[str, Any], path: Path | None, first: int, last: int, save_at: int | None = None) -> Any:
    """Steps first..last-1, from the checkpoint at `path` unless first is 0; saved there after step `save_at`."""
    engine, groups = start(recipe(**arguments))
    if first or (path is not None and save_at is None):
        assert path is not None
        engine.load(path, engine.rank_state())
    if save_at is not None:
        head = steps(engine, groups, first, save_at)
        assert path is not None
        engine.save(path)
        return head + steps(engine, groups, save_at, last)
    return steps(engine, groups, first, last)


def fresh(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_undisturbed_one(world2: Any, tmp_path: Path, kind: str) -> None:
    """Guards against moments, float32 weights, step counts or rates that a checkpoint lacks, and against a save that
    changes what follows."""
    arguments, path = KINDS[kind], fresh(tmp_path / "a")
    whole = world2.run(train, arguments, None, 0, LAST)
    assert world2.run(train, arguments, path, 0, LAST, FIRST) == whole
    resumed = world2.run(train, arguments, path, FIRST, LAST)
    assert [x[FIRST:] for x in whole] == resumed


@pytest.mark.parametrize("kind", ["distributed", "overlaps", "replicated"])
def test_another_number_of_data_parallel_ranks(world2: Any, world4: Any, tmp_path: Path, kind: str) -> None:
    """Guards against moments that are bound to the ranks that wrote them."""
    arguments, path = KINDS[kind], fresh(tmp_path / "a")
    whole = world2.run(train, arguments, path, 0, LAST, FIRST)
    for of_rank in world4.run(train, arguments, path, FIRST, LAST):
        for got, want in zip(of_rank, whole[0][FIRST:], strict=True):
            assert got == pytest.approx(want, rel=2e-5)


def test_a_run_saved_before_its_first_step(world2: Any, tmp_path: Path) -> None:
    """Guards against a step that only the description of a checkpoint has taken: Adam would be one step ahead."""
    arguments, path = KINDS["distributed"], fresh(tmp_path / "a")
    whole = world2.run(train, arguments, path, 0, LAST, 0)
    assert whole == world2.run(train, arguments, None, 0, LAST)
    assert world2.run(train, arguments, path, 0, LAST) == whole


def missing(path: Path) -> str:
    engine, _ = start(recipe(parallel={"engine": "megatron"}))
    try:
        engine.load(path, None)
    except RuntimeError as error:
        return str(error)
    return ""


def test_nothing_to_load(world2: Any, tmp_path: Path) -> None:
    """Guards against a run that silently starts anew."""
    assert all("found none" in said for said in world2.run(missing, tmp_path))


@needs_muon
@pytest.mark.parametrize("kind", [k for k in MUON if k != "layer-wise, by size"])
def test_a_resumed_run_of_muon_is_the_undisturbed_one(world2: Any, tmp_path: Path, kind: str) -> None:
    """Guards against a momentum that one rank alone holds and nobody writes, and AdamW's moments beside it."""
    arguments, path = {**MUON[kind], "optimizer": "muon"}, fresh(tmp_path / "a")
    whole = world2.run(train, arguments, None, 0, LAST)
    assert world2.run(train, arguments, path, 0, LAST, FIRST) == whole
    resumed = world2.run(train, arguments, path, FIRST, LAST)
    assert [x[FIRST:] for x in whole] == resumed


@needs_muon
def test_a_resumed_run_of_muon_over_tensor_parallel_ranks(world4: Any, tmp_path: Path) -> None:
    """Guards against shards of a momentum written under one name by several ranks: TP 2 x DP 2, layer-wise."""
    arguments, path = {**MUON["layer-wise"], "optimizer": "muon", "tp": 2, "sp": True}, fresh(tmp_path / "a")
    whole = world4.run(train, arguments, path, 0, LAST, FIRST)
    assert [x[FIRST:] for x in whole] == world4.run(train, arguments, path, FIRST, LAST)


@needs_muon
def test_muon_on_another_number_of_data_parallel_ranks(world2: Any, world4: Any, tmp_path: Path) -> None:
    """Guards against a momentum that is bound to the ranks that wrote it."""
    arguments, path = {**MUON["plain"], "optimizer": "muon"}, fresh(tmp_path / "a")
    whole = world2.run(train, arguments, path, 0, LAST, FIRST)
    for of_rank in world4.run(train, arguments, path, FIRST, LAST):
        for got, want in zip(of_rank, whole[0][FIRST:], strict=True):
            assert got == pytest.approx(want, rel=1e-4)
