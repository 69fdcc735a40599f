"""Whole runs of Megatron's engine: the ledger of one process, and exact resume."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from launched import VOLATILE, tiny
from megatron_muon import needs_muon

from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics

SHORT = ("training.train_steps=4", "training.micro_batch_size=1", "selection.debug_checks=true")
LAYOUTS = {
    "TP 2 x PP 2": ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"),
    "PP 2 x DP 2, overlaps": (
        *("parallel.pipeline_model_parallel_size=2", "parallel.overlap_grad_reduce=true"),
        "parallel.overlap_param_gather=true",
    ),
    "PP 4, interleaved": (
        *("parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=2"),
    ),
}


def ledger_of(server: Any, cache: Path, runs: Path, name: str, world: int, *more: str) -> Any:
    run = server.launch(world, tiny(cache, runs, name, *SHORT, *more), runs / f"logs_{name}")
    assert set(run.wait().values()) == {0}, run.log(0)
    return read_ledger(run.run_dir / "ledger"), read_metrics(run.run_dir)


DEEP = ("model.num_layers=8",)


@pytest.fixture(scope="module")
def one_process(server: Any, embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ledger_of(server, embedded_cache, tmp_path_factory.mktemp("one"), "one", 1, *DEEP)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ledger_is_that_of_one_process(
    server: Any, embedded_cache: Path, one_process: Any, tmp_path: Path, layout: str
) -> None:
    """Guards against a layout that draws other sequences: of all that a run leaves, the ids are what counts."""
    one, rows = one_process
    layout_keys = ("parallel.engine=megatron", *LAYOUTS[layout])
    four, others = ledger_of(server, embedded_cache, tmp_path, "four", 4, *DEEP, *layout_keys)
    for column in ("step", "sample_id", "selected"):
        assert one[column].equals(four[column]), column
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert others[-1]["validation_loss"] == pytest.approx(rows[-1]["validation_loss"], rel=1e-4)


def test_both_engines_train_the_same_run(server: Any, embedded_cache: Path, tmp_path: Path) -> None:
    """Guards against a recipe whose losses depend on the engine: AdamW, two data-parallel ranks, selection, warm-up,
    decay, clipping and two accumulation steps. float32 sums in another order are left."""
    keys = ("training.train_steps=8", "training.micro_batch_size=1", "selection.debug_checks=true")
    schedule = ("optimizer.lr_warmup_fraction=0.45", "optimizer.lr_decay_steps=7", "optimizer.min_lr=0.0001")
    found = {}
    for engine in ("deepspeed", "megatron"):
        run = server.launch(
            2,
            tiny(embedded_cache, tmp_path, engine, *keys, *schedule, f"parallel.engine={engine}"),
            tmp_path / f"logs_{engine}",
        )
        assert set(run.wait().values()) == {0}, run.log(0)
        found[engine] = read_ledger(run.run_dir / "ledger"), read_metrics(run.run_dir)
    (one, rows), (other, others) = found["deepspeed"], found["megatron"]
    for column in ("step", "sample_id", "selected", "draw_order"):
        assert one[column].equals(other[column]), column
    for name in ("loss", "grad_norm", "lr"):
        want = [row[name] for row in rows]
        assert [row[name] for row in others] == pytest.approx(want, rel=ENGINES_AGREE), name
    assert others[-1]["validation_loss"] == pytest.approx(rows[-1]["validation_loss"], rel=ENGINES_AGREE)


@needs_muon
def test_a_run_of_megatrons_muon(server: Any, embedded_cache: Path, tmp_path: Path) -> None:
    """Guards against a start, a report or a checkpoint that knows DeepSpeed's Muon alone: whole matrices over TP 2 x
    PP 2 draw what one process draws, and a layer-wise run in bf16 resumes as the undisturbed one."""
    muon = ("parallel.engine=megatron", "optimizer.name=muon", "optimizer.muon_lr=0.001")
    whole = (*muon, "parallel.use_distributed_optimizer=false", "optimizer.muon_fp32_matmul_prec=highest")
    one, rows = ledger_of(server, embedded_cache, tmp_path, "one", 1, *whole)
    layout = (*LAYOUTS["TP 2 x PP 2"], "optimizer.muon_tp_mode=duplicated")
    four, others = ledger_of(server, embedded_cache, tmp_path, "four", 4, *whole, *layout)
    for column in ("step", "sample_id", "selected"):
        assert one[column].equals(four[column]), column
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert {row["geometry"] for row in others[1:]} == {"muon"}
    layer_wise = (*muon, "training.precision=bf16", "training.checkpoint_interval=2")
    schedule = ("training.train_steps=2", "optimizer.lr_decay_steps=4", "optimizer.min_lr=0.0001")
    straight, rows = ledger_of(server, embedded_cache, tmp_path, "long", 2, *layer_wise, *schedule[1:])
    ledger_of(server, embedded_cache, tmp_path, "part", 2, *layer_wise, *schedule)
    resumed, others = ledger_of(server, embedded_cache, tmp_path, "part", 2, *layer_wise, *schedule[1:], "--resume")
    assert straight.equals(resumed)
    assert [row["loss"] for row in others] == [row["loss"] for row in rows]


ENGINES_AGREE = 1e-5  # float32

STEPS, INTERVAL = 20, 4
KILLS, FEW = 5, 3  # whole and short form
# the distributed optimizer over two data-parallel ranks, returned candidates, proxy momentum and dropout
ALL_STATE = (
    *("parallel.engine=megatron", "model.hidden_dropout=0.1", "data.unselected=return", "selection.proxy_momentum=0.9"),
    *("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
    *("selection.sketch.alignment=features", "selection.preconditioner.refresh_every=3"),
    *(f"training.train_steps={STEPS}", f"training.checkpoint_interval={INTERVAL}", "training.eval_interval=6"),
)


def test_killed_runs_resume_exactly(server: Any, embedded_cache: Path, tmp_path: Path, whole: bool) -> None:
    """Guards against state of the distributed optimizer that its checkpoint lacks. Killed with SIGKILL at random
    points, among them before the first checkpoint."""
    kills = KILLS if whole else FEW
    straight = server.launch(2, tiny(embedded_cache, tmp_path, "whole", *ALL_STATE), tmp_path / "logs")
    assert straight.wait() == {0: 0, 1: 0}, straight.log(0)
    chance = random.Random(7)
    points = [2, *sorted(chance.sample(range(INTERVAL + 1, STEPS - 1), kills - 1))]
    arguments = tiny(embedded_cache, tmp_path, "killed", *ALL_STATE)
    for attempt, steps in enumerate(points):
        run = server.launch(2, arguments, tmp_path / f"logs{attempt}")
        run.reach(lambda run=run, steps=steps: run.steps() >= steps)
        time.sleep(chance.uniform(0, 0.06))
        run.kill()
        arguments = [*tiny(embedded_cache, tmp_path, "killed", *ALL_STATE), "--resume"]
    last = server.launch(2, arguments, tmp_path / "logs_last")
    assert last.wait() == {0: 0, 1: 0}, last.log(0)
    assert "resumed from" in last.log(0)
    rows = [
        [{k: v for k, v in row.items() if k not in VOLATILE} for row in read_metrics(run.run_dir)]
        for run in (straight, last)
    ]
    assert rows[0] == rows[1]
    first, second = (read_ledger(run.run_dir / "ledger") for run in (straight, last))
    assert first.equals(second)


def test_a_run_goes_on_with_another_number_of_data_parallel_ranks(
    server: Any, embedded_cache: Path, tmp_path: Path
) -> None:
    """Guards against a layout that is refused although Megatron's checkpoint can be read, and ids that depend on it."""
    keys = ("parallel.engine=megatron", "training.micro_batch_size=1", "training.checkpoint_interval=3")
    whole, rows = ledger_of(server, embedded_cache, tmp_path, "whole", 2, *keys, "training.train_steps=6")
    schedule = ("training.train_steps=3", "optimizer.lr_decay_steps=6", "optimizer.min_lr=0.0002")
    ledger_of(server, embedded_cache, tmp_path, "part", 2, *keys, *schedule)
    more = (*keys, "training.train_steps=6", "optimizer.lr_decay_steps=6", "--resume")
    resumed, others = ledger_of(server, embedded_cache, tmp_path, "part", 4, *more)
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    for column in ("step", "sample_id", "selected"):
        assert whole[column].equals(resumed[column]), column
