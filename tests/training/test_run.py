"""Whole runs: the same selections for every layout, nothing changed by scoring, clear ends of bad ones."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tiny_runs import STEPS, recipe, run

from megatron_opus.config import RunConfig


def same_decisions(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert len(a["ids"]) == STEPS * 8
    assert a["ids"] == b["ids"]
    assert a["selected"] == b["selected"]
    assert a["order"] == b["order"]
    error = (a["alignment"] - b["alignment"]).abs() / a["alignment"].abs().clamp_min(1e-12)
    assert error.median() < 1e-3
    assert max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True)) < 1e-4


@pytest.fixture(scope="module")
def one_rank(embedded_cache, tmp_path_factory, world2):
    """The run of one layout to compare with: two data-parallel ranks, ZeRO stage 0."""
    config = recipe(embedded_cache, tmp_path_factory.mktemp("runs"), "reference")
    return world2.run(run, config)[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stages_make_the_same_selections(world2, one_rank, embedded_cache, tmp_path, stage):
    """Fault: partitioned moments read wrongly give other utilities, which shows as other draws within a few steps."""
    config = recipe(embedded_cache, tmp_path, f"zero{stage}", parallel={"zero_stage": stage})
    same_decisions(one_rank, world2.run(run, config)[0])


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_makes_the_same_selections(world2, world4, one_rank, embedded_cache, tmp_path, tp):
    """Fault: sketches of shards that do not add up to those of the whole. 22 steps, 176 decisions."""
    pool = {2: world2, 4: world4}[tp]
    config = recipe(embedded_cache, tmp_path, f"tp{tp}", parallel={"tensor_model_parallel_size": tp})
    same_decisions(one_rank, pool.run(run, config)[0])


def test_tensor_times_data_parallel_with_zero(world4, one_rank, embedded_cache, tmp_path):
    """Fault: a candidate share or a group mixed up when both kinds of parallelism are on."""
    config = recipe(embedded_cache, tmp_path, "tp2dp2", parallel={"tensor_model_parallel_size": 2, "zero_stage": 2})
    same_decisions(one_rank, world4.run(run, config)[0])


def test_selecting_everything_is_not_selecting(world2, embedded_cache, tmp_path):
    """Fault: scoring that leaves a trace, or draw order that changes the order of summation. With rho = 1, opus trains
    bit-identically to random and to the bare loop over the same buffer."""
    everything = {"rho": 1.0}
    opus = world2.run(run, recipe(embedded_cache, tmp_path, "opus", selection=everything))[0]
    random = world2.run(
        run, recipe(embedded_cache, tmp_path, "random", selection={**everything, "strategy": "random"})
    )[0]
    bare = world2.run(bare_loop, recipe(embedded_cache, tmp_path, "bare", selection=everything))[0]
    assert opus["losses"] == random["losses"] == bare["losses"]
    assert torch.equal(opus["weights"], random["weights"])
    assert torch.equal(opus["weights"], bare["weights"])
    assert opus["rows"][-1]["score_seconds"] > 0
    assert random["rows"][-1]["score_seconds"] == 0


def bare_loop(config: RunConfig) -> dict[str, Any]:
    """The same training without driver, strategy or scoring pass."""
    from megatron_opus.backends.engines.build import build_engine
    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.model.build import build_model, resolve
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.data.buffer import CandidateBuffer
    from megatron_opus.runs.data import open_corpus

    init_distributed(config.parallel)
    corpus = open_corpus(config, lambda text: None)
    config = resolve(config, corpus.tokenizer.vocab_size)
    groups = init_parallel(config.parallel, seed=config.seed)
    engine = build_engine(build_model(config), config, groups)
    buffer = CandidateBuffer(corpus, config.buffer_size, config.seed)
    losses = []
    for step in range(config.training.train_steps):
        drawn = buffer.draw(step)
        buffer.settle(drawn, range(len(drawn)))
        share = len(drawn) // groups.dp_size
        mine = drawn.sample_ids[groups.dp_rank * share : (groups.dp_rank + 1) * share]
        losses.append(engine.train_step(iter([corpus.batch([i]) for i in mine])).loss)
    weights = torch.cat([p.detach().float().flatten() for p in engine.module.parameters()])
    return {"losses": losses, "weights": weights}


def test_bf16_and_masked_documents_run(world2, embedded_cache, tmp_path):
    """Fault: a code path that only fp32, or only plain causal attention, ever takes."""
    config = recipe(
        embedded_cache,
        tmp_path,
        "bf16",
        parallel={"zero_stage": 1, "tensor_model_parallel_size": 2},
        data={"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True},
        training={"precision": "bf16", "train_steps": 8},
    )
    result = world2.run(run, config)[0]
    assert result["rows"][-1]["geometry"] == "adamw-separable"
    assert result["losses"][-1] < result["losses"][0]
    assert result["rows"][-1]["fallbacks"] == 0
    slow = torch.backends.cpu.get_cpu_capability() == "AVX2" and not torch.cuda.is_available()
    assert any("this processor has no instructions for bf16" in line for line in result["said"]) == slow


def fails(config: RunConfig, resume: bool = False) -> str:
    try:
        run(config, resume)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_diverging_run_stops_with_its_checkpoint_intact(world2, embedded_cache, tmp_path):
    """Fault: a NaN loss trained on until the last good checkpoint has been rotated away."""
    config = recipe(
        embedded_cache,
        tmp_path,
        "nan",
        optimizer={"lr": 1e3, "lr_warmup_steps": 0},
        training={"checkpoint_interval": 1, "keep_checkpoints": 1, "max_nonfinite_steps": 2, "gradient_clipping": 0.0},
    )
    said = world2.run(fails, config)
    assert all("NonFiniteLoss" in text and "sample ids" in text for text in said), said
    assert list((tmp_path / "nan/checkpoints").glob("*/complete.json"))


def without_weights(config: RunConfig, resume: bool) -> str:
    """What a run says whose weights are NaN from its start."""
    from megatron_opus.training.session import Session

    session = Session(config, resume=resume, versions={}, say=lambda text: None)
    with torch.no_grad():
        for parameter in session.engine.module.parameters():
            parameter.fill_(float("nan"))
    try:
        session.train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_run_whose_last_losses_are_no_numbers_fails(world2, embedded_cache, tmp_path):
    """Guards against a run that ends with status 0 and NaN for its losses, and against one that does when resumed."""
    config = recipe(
        embedded_cache,
        tmp_path,
        "last",
        training={"train_steps": 2, "max_nonfinite_steps": 100},
        selection={"strategy": "random"},
    )
    for resume in (False, True):
        said = world2.run(without_weights, config, resume)
        assert all("NonFiniteLoss: the run has ended, but its last losses are no numbers: loss" in t for t in said), (
            said
        )


def test_another_run_is_never_written_over(world2, embedded_cache, tmp_path):
    """Fault: a second start with the same name destroys the first run's record."""
    config = recipe(embedded_cache, tmp_path, "mine", training={"train_steps": 2})
    world2.run(run, config)
    before = {p: p.read_bytes() for p in (tmp_path / "mine").rglob("*") if p.is_file()}
    assert all("RunDirectoryError" in text and "--resume" in text for text in world2.run(fails, config))
    assert before == {p: p.read_bytes() for p in (tmp_path / "mine").rglob("*") if p.is_file()}


def test_resuming_nothing_is_refused(world2, embedded_cache, tmp_path):
    """Fault: --resume with a mistyped name silently starts from step 0."""
    config = recipe(embedded_cache, tmp_path, "nothing")
    assert all("found none" in text for text in world2.run(fails, config, True))


def test_a_record_is_not_lost_when_checkpoints_are_missing(world2, embedded_cache, tmp_path):
    """Fault: --resume with checkpoints/ on an unmounted disk starts from step 0 and cuts the record to nothing."""
    import shutil

    config = recipe(embedded_cache, tmp_path, "lost", training={"train_steps": 4, "checkpoint_interval": 2})
    world2.run(run, config)
    shutil.rmtree(tmp_path / "lost/checkpoints")
    assert all("disk mounted" in text for text in world2.run(fails, config, True))
    assert len((tmp_path / "lost/metrics.jsonl").read_text().splitlines()) == 4
    other = recipe(
        embedded_cache, tmp_path, "lost", training={"train_steps": 4, "checkpoint_interval": 2}, optimizer={"lr": 1e-4}
    )
    assert all("other settings" in text and "optimizer.lr" in text for text in world2.run(fails, other, True))


def test_ranks_with_other_settings_are_named(world2, embedded_cache, tmp_path):
    """Fault: one rank with another configuration ends in a hang, or in quietly different selections."""
    said = world2.run(other_settings, recipe(embedded_cache, tmp_path, "mixed"))
    assert all("RankMismatch" in text and "rank 1: configuration.seed is 43, rank 0 has 42" in text for text in said), (
        said
    )


def other_settings(config: RunConfig) -> str:
    import dataclasses

    import torch.distributed as dist

    return fails(dataclasses.replace(config, seed=config.seed + dist.get_rank()))


def test_run_folder_holds_what_it_should(world2, embedded_cache, tmp_path):
    """Fault: a metric that the terminal shows but no file keeps."""
    from megatron_opus.config import load

    config = recipe(
        embedded_cache, tmp_path, "files", training={"train_steps": 3, "eval_interval": 2, "tensorboard": True}
    )
    world2.run(run, config)
    folder = tmp_path / "files"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "tensorboard", "ledger", "checkpoints"
    }  # fmt: skip
    resolved = load(folder / "config.yaml")
    assert resolved.model.vocab_size is not None
    from megatron_opus.runs.metrics import read_metrics

    rows = read_metrics(folder)
    assert [("validation_loss" in row) for row in rows] == [False, True, True]
    expected = {
        "step", "loss", "lr", "grad_norm", "update_tokens", "candidate_tokens", "scored_tokens", "entropy_ratio",
        "redundancy_share", "top_k_share", "score_seconds", "choose_seconds", "step_seconds", "step_cpu_seconds",
        "memory_bytes", "score_bytes_sent", "fallbacks", "geometry", "selected_share",
    }  # fmt: skip
    assert expected <= set(rows[0])
    assert rows[-1]["update_tokens"] == 3 * 4 * 32
    assert os.listdir(folder / "tensorboard")
