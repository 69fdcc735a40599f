"""Strategies in whole runs: the same selections for every layout, and after a resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import DistributedPool
from gpt_runs import batch_of_step, share_of_rank, start
from gpt_runs import recipe as small_recipe

from megatron_opus.config import RunConfig, from_dict

STEPS = 12
ADO = {"enabled": True, "skip_steps": 0, "first_fit": 9, "refit_every": 2, "block_steps": 1, "min_log_epsilon": -1.0}
KINDS: dict[str, dict[str, Any]] = {
    "high_ppl": {"strategy": "high_ppl", "score_micro_batch_size": 1},
    "greats": {"strategy": "greats", "redundancy": {"scale": "paper"}},
    "filter_then_weight": {"strategy": "filter_then_weight", "proxy_momentum": 0.5},
    "opus_in_ado_with_floors": {"strategy": "opus", "ado": ADO, "floors": {"minimum": {"prose": 0.25}}},
    # everything that decides what is scored and drawn, at once: rests and probes fall into the run's twelve steps
    "composition": {
        "strategy": "filter_then_weight",
        "domain_bandit": {"enabled": True, "move_every": 3},
        "controller": {"enabled": True, "window": 3, "probe_first": 2, "cost": 20.0},
        "prefilter": {"pool_ratio": 2, "columns": 1024},
    },
    "picked_every_step": {
        "strategy": "random",
        "domain_bandit": {"enabled": True, "move_every": 3},
        "prefilter": {"pool_ratio": 4, "columns": 1024, "every_step": True},
        "controller": {"enabled": True, "window": 3, "probe_first": 2, "cost": 20.0},
    },
}
SCHEDULED = {
    "domain_weights": None,
    "domain_schedule": {
        "points": {"0%": {"prose": 1, "source": 3}, "step 8": {"prose": 2, "tables": 1, "docstrings": 1}},
        "interpolation": "linear",
    },
}


def sections(kind: str) -> dict[str, dict[str, Any]]:
    return {"data": SCHEDULED} if kind == "composition" else {}


def recipe(cache: Path, output: Path, name: str, selection: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """A model of two small layers on the embedded corpus, all four domains in every buffer."""
    raw: dict[str, Any] = {
        "name": name,
        "output_dir": str(output),
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
        "data": {
            "cache_dir": str(cache),
            "seq_length": 32,
            "domain_weights": {"prose": 0.25, "docstrings": 0.25, "source": 0.25, "tables": 0.25},
        },
        "optimizer": {"lr": 3e-3, "min_lr": 1e-4, "lr_warmup_steps": 1, "lr_decay_steps": 40},
        "parallel": {"zero_stage": 1},
        "training": {
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "train_steps": STEPS,
            "eval_interval": 0,
            "eval_sequences": 4,
            "checkpoint_interval": 0,
            "tensorboard": False,
        },
        "selection": {"proxy_batch_size": 4, "score_length": 32, "debug_checks": True, **selection},
    }
    for section, values in sections.items():
        raw[section] = {**raw[section], **values}
    return from_dict(raw)


def run(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    from megatron_opus.runs.ledger import read_ledger
    from megatron_opus.runs.metrics import read_metrics
    from megatron_opus.training.session import Session

    said: list[str] = []
    session = Session(config, resume=resume, versions={}, say=said.append)
    session.train()
    ledger = read_ledger(session.run_dir / "ledger")
    return {
        "rows": read_metrics(session.run_dir),
        "ids": ledger["sample_id"].to_pylist(),
        "order": ledger["draw_order"].to_pylist(),
        "utility": np.array(ledger["utility"].to_pylist(), dtype=np.float64),
        "domains": ledger["domain"].to_pylist(),
        "weights": torch.cat([p.detach().float().flatten() for p in session.engine.module.parameters()]),
    }


@pytest.fixture(scope="module")
def alone() -> Iterator[DistributedPool]:
    pool = DistributedPool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_times_data_parallel_selects_as_one_process_does(alone, world4, embedded_cache, tmp_path, kind):
    """Fault: losses of another rank's candidates, per-domain losses of one rank's share, weights given to another
    sequence: each shows as another id or loss within a few steps. Utilities agree up to the order of summation."""
    selection = KINDS[kind]
    one = alone.run(run, recipe(embedded_cache, tmp_path, "one", selection, **sections(kind)))[0]
    parallel = {"tensor_model_parallel_size": 2}
    four = world4.run(run, recipe(embedded_cache, tmp_path, "four", selection, parallel=parallel, **sections(kind)))
    for other in four:
        assert other["ids"] == one["ids"]
        assert other["order"] == one["order"]
    np.testing.assert_allclose(four[0]["utility"], one["utility"], rtol=2e-3, atol=1e-9)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one["rows"], four[0]["rows"], strict=True)) < 1e-4
    assert one["rows"][-1]["fallbacks"] == 0
    if kind == "high_ppl":
        assert one["rows"][-1]["geometry"] == ""
        assert one["rows"][-1]["scored_tokens"] == STEPS * 8 * 32  # no proxy
        assert all(r["selected_loss"] > r["candidate_loss"] for r in one["rows"])
    if kind == "greats":
        assert {row["geometry"] for row in one["rows"]} == {"sgd"}
    if kind == "composition":
        scored = [row["geometry"] != "" for row in one["rows"]]
        assert scored[:3] == [True] * 3
        assert not all(scored)
        assert any(scored[3:])
        shares = [row["bandit_share/prose"] for row in one["rows"] if "bandit_share/prose" in row]  # no rests
        assert shares[-1] != shares[0]
        assert "prefilter_gain" in one["rows"][0]
        assert one["domains"][:8].count("tables") == 0
        assert "tables" in one["domains"][-8:]
    if kind == "picked_every_step":
        rows = one["rows"]
        scored = [row["step"] for row in rows if "prefilter_gain" in row]
        assert scored[:3] == [0, 3, 6]
        picked = [row["step"] for row in rows if row["prefilter_picks"]]
        assert picked == [0, 3, 4, 5, *scored[2:]]  # first when a gain was seen; not while scoring is suspended
        assert not any(row["controller_scoring"] for row in rows[7:])
        rested = {**selection, "prefilter": {**selection["prefilter"], "every_step": False}}
        first = alone.run(run, recipe(embedded_cache, tmp_path, "rested", rested, training={"train_steps": 6}))[0]
        assert first["ids"][:32] == one["ids"][:32]
        assert first["ids"][32:] != one["ids"][32:48]
        assert first["ids"][32:34] != one["ids"][32:34]  # of the pool, the first two: unseen where nothing is scored
        assert "prefilter_seconds" not in first["rows"][4]
    if kind == "filter_then_weight":
        assert any(row["effective_sequences"] < 3.99 for row in one["rows"])
    if kind == "opus_in_ado_with_floors":
        assert one["rows"][-1]["ado_fitted"] > 0
        assert any(row["ado_share/prose"] != 0.25 for row in one["rows"])
        taken = np.array(one["domains"])[np.array(one["order"]) >= 0].reshape(STEPS, 4)
        assert ((taken == "prose").sum(1) >= 1).all()
        assert all(row["floors_breached"] == row["floors_unsupplied"] == 0 for row in one["rows"])


@pytest.mark.parametrize("kind", ["opus_in_ado_with_floors", "composition", "picked_every_step"])
def test_a_resumed_mixture_ends_as_an_undisturbed_one(alone, embedded_cache, tmp_path, kind):
    """Fault: a curve, a policy, a fit, a window or an n-gram missing from the checkpoint. Stopped between two fits, or
    between a suspension and the next probe; equal to the bit."""
    whole, resumed = resumed_run(alone, embedded_cache, tmp_path, kind)
    ado = ("ado_share/prose", "ado_share/tables", "ado_failed_fits")
    mixture = ado if kind == "opus_in_ado_with_floors" else ("bandit_share/prose", "controller_scoring")
    for key in ("loss", "selected_share", "domain_tokens", "domain_epochs", *mixture):
        assert [row.get(key) for row in resumed["rows"]] == [row.get(key) for row in whole["rows"]]
    assert resumed["ids"] == whole["ids"]
    assert torch.equal(resumed["weights"], whole["weights"])


def test_the_proxy_average_of_each_tensor_parallel_rank_is_resumed(world2, embedded_cache, tmp_path):
    """Fault: the side of the proxy gradient that rank 0 holds, given to every rank."""
    whole, resumed = resumed_run(world2, embedded_cache, tmp_path, "filter_then_weight", tensor_model_parallel_size=2)
    assert resumed["ids"] == whole["ids"]
    np.testing.assert_array_equal(resumed["utility"], whole["utility"])


def resumed_run(pool, cache, output, kind: str, **parallel: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a whole run and one that was stopped after ten of its steps give on rank 0."""

    def settings(name: str, **training: int) -> RunConfig:
        return recipe(cache, output, name, KINDS[kind], training=training, parallel=parallel, **sections(kind))

    whole = pool.run(run, settings("whole"))[0]
    pool.run(run, settings("cut", train_steps=10))
    return whole, pool.run(run, settings("cut"), True)[0]


def test_another_mixture_at_a_resume_is_recorded(alone, embedded_cache, tmp_path):
    """Fault: a mixture that cannot be changed in the middle of a run, or whose change leaves no trace; another setting
    that slips through with it."""
    selection = {"strategy": "random"}
    alone.run(run, recipe(embedded_cache, tmp_path, "cut", selection, training={"train_steps": 6}))
    resumed = alone.run(run, recipe(embedded_cache, tmp_path, "cut", selection, data=SCHEDULED), True)[0]
    (line, *_) = (tmp_path / "cut" / "changes.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 6
    changed = {json.loads(x)["key"] for x in (tmp_path / "cut" / "changes.jsonl").read_text().splitlines()}
    assert {"data.domain_weights.prose", "data.domain_schedule.interpolation"} <= changed
    assert {*resumed["domains"][-8:]} <= {"prose", "tables", "docstrings"}
    with pytest.raises(Exception, match="belongs to another run"):
        alone.run(run, recipe(embedded_cache, tmp_path, "cut", selection, optimizer={"lr": 1e-3}), True)


def sequence_losses_of_rank(tp: int) -> tuple[torch.Tensor, float]:

    engine, groups = start(small_recipe(tp=tp))
    batch = batch_of_step(0)
    batch.loss_mask[1] *= 0.5  # a weight
    batch.loss_mask[2] = 0.0  # weight zero
    result = engine.train_step(share_of_rank(batch, groups, 2), per_sequence=True)
    assert result.sequence_loss is not None
    return result.sequence_loss, result.loss


def test_losses_of_single_sequences_come_with_the_step(world2):
    """Fault: losses in rank order of another layout, or scaled by the weights of the selection; a sequence of weight
    zero that counts as loss 0. Tensor-parallel 2 and data-parallel 2 give the same K numbers on every rank."""
    split = world2.run(sequence_losses_of_rank, 2)
    shared = world2.run(sequence_losses_of_rank, 1)
    for losses, _ in (*split, *shared):
        assert losses.shape == (8,)
        assert torch.isnan(losses[2])
        torch.testing.assert_close(losses, split[0][0], rtol=1e-4, atol=1e-5, equal_nan=True)
    for pair in (split, shared):
        assert torch.equal(pair[0][0].nan_to_num(), pair[1][0].nan_to_num())
    weights = torch.tensor([1, 0.5, 0, 1, 1, 1, 1, 1])
    assert (weights * split[0][0].nan_to_num()).mean().item() == pytest.approx(split[0][1], rel=1e-4)
