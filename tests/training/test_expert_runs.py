"""Whole runs of a mixture of experts: the ledger of one process under both engines, and exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launched import tiny

from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics
from megatron_opus.training.metrics import expert_load
from megatron_opus.types import Selection, Signals

RECIPE = "pretrain_qwen3_moe_tiny"
SHORT = ("training.train_steps=4", "training.micro_batch_size=1", "selection.debug_checks=true")
SMALL = ("model.num_query_groups=2", "model.kv_channels=8", "model.moe_ffn_hidden_size=24")
MEGATRON = "parallel.engine=megatron"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "DeepSpeed, ZeRO 1, DP 2": (2, ()),
    "DeepSpeed, ZeRO 3, DP 2": (2, ("parallel.zero_stage=3",)),
    "DP 2": (2, (MEGATRON,)),
    "EP 2": (2, (MEGATRON, "parallel.expert_model_parallel_size=2")),
    "EP 2, all to all, overlaps": (
        2,
        (
            *(MEGATRON, "parallel.expert_model_parallel_size=2", "parallel.moe_token_dispatcher_type=alltoall"),
            *("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
        ),
    ),
    "TP 2 x EP 2 x DP 2": (
        4,
        (
            *(MEGATRON, "parallel.expert_model_parallel_size=2", "parallel.tensor_model_parallel_size=2"),
            "parallel.sequence_parallel=true",
        ),
    ),
}


def ledger_of(server: Any, cache: Path, runs: Path, name: str, world: int, *more: str) -> Any:
    run = server.launch(world, tiny(cache, runs, name, *SHORT, *SMALL, *more), runs / f"logs_{name}", recipe=RECIPE)
    assert set(run.wait().values()) == {0}, run.log(0)
    return read_ledger(run.run_dir / "ledger"), read_metrics(run.run_dir)


@pytest.fixture(scope="module")
def one_process(server: Any, embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ledger_of(server, embedded_cache, tmp_path_factory.mktemp("one"), "one", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ledger_is_that_of_one_process(
    server: Any, embedded_cache: Path, one_process: Any, tmp_path: Path, layout: str
) -> None:
    """Guards against experts whose layout or engine changes which sequences are drawn."""
    one, rows = one_process
    world, keys = LAYOUTS[layout]
    many, others = ledger_of(server, embedded_cache, tmp_path, "many", world, *keys)
    for column in ("step", "sample_id", "selected"):
        assert one[column].equals(many[column]), column
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    for key in ("expert_load_offered", "expert_load_chosen"):
        assert [row[key] for row in others] == pytest.approx([row[key] for row in rows], rel=1e-4)
        assert all(1.0 <= row[key] <= 4.0 for row in rows)  # each token takes 2 of 8 experts
    assert others[-1]["validation_loss"] == pytest.approx(rows[-1]["validation_loss"], rel=1e-4)


def test_a_run_over_expert_ranks_resumes_exactly(server: Any, embedded_cache: Path, tmp_path: Path) -> None:
    """Guards against experts of other ranks that a checkpoint lacks, or puts in another's place."""
    keys = (MEGATRON, "parallel.expert_model_parallel_size=2", "training.checkpoint_interval=2")
    whole, rows = ledger_of(server, embedded_cache, tmp_path, "whole", 2, *keys)
    schedule = ("training.train_steps=2", "optimizer.lr_decay_steps=4", "optimizer.min_lr=0.0002")
    ledger_of(server, embedded_cache, tmp_path, "part", 2, *keys, *schedule)
    more = (*keys, "optimizer.lr_decay_steps=4", "optimizer.min_lr=0.0002", "--resume")
    resumed, others = ledger_of(server, embedded_cache, tmp_path, "part", 2, *more)
    assert [row["loss"] for row in others] == [row["loss"] for row in rows]
    for column in ("step", "sample_id", "selected"):
        assert whole[column].equals(resumed[column]), column


def test_the_load_is_that_of_the_busiest_expert() -> None:
    """Guards against a load of all candidates under the name of the chosen ones, and layers that are mixed."""
    even, one_sided = torch.tensor([2.0, 2.0, 2.0, 2.0]), torch.tensor([0.0, 8.0, 0.0, 0.0])
    load = torch.stack([torch.stack([even, even]), torch.stack([one_sided, even])])  # [N, layers, experts]
    signals = Signals(expert_load=load)
    found = expert_load(signals, Selection(indices=torch.tensor([1])))
    assert found == {"expert_load_offered": (10 / 4 + 1) / 2, "expert_load_chosen": (4 + 1) / 2}
    assert expert_load(Signals(), Selection(indices=torch.tensor([1]))) == {}
