"""What is read out of a run's record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_opus.config import dump, load
from megatron_opus.runs.curves import read_run

RECIPE = Path(__file__).resolve().parents[2] / "configs/pretrain_gpt2_tiny.yaml"


def recorded(folder, rows):
    """A run folder whose last step is evaluated; `rows` add to what every step has."""
    steps = [
        {"step": i, "step_seconds": 1.0, "step_cpu_seconds": 0.5, "update_tokens": 8 * (i + 1), **row}
        for i, row in enumerate(rows)
    ]
    steps[-1]["validation_loss"] = {"prose": 3.0}
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(load(RECIPE)), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    return read_run(folder)


def test_what_a_run_chose_is_the_mean_over_its_steps(tmp_path):
    """Fault: a domain that a step did not take left out of that step's mean, so that shares add up to more than 1."""
    run = recorded(
        tmp_path / "run",
        [
            {"selected_share": {"prose": 1.0}, "entropy_ratio": 0.5},
            {"selected_share": {"prose": 0.25, "noise": 0.75}, "entropy_ratio": None},
            {"selected_share": {"noise": 1.0}, "entropy_ratio": 0.25},
        ],
    )
    assert run.selected_share == {"noise": pytest.approx(1.75 / 3), "prose": pytest.approx(1.25 / 3)}
    assert run.entropy_ratio == pytest.approx(0.375)


def test_the_largest_gradient_leaves_out_the_first_steps(tmp_path):
    """Fault: every run's first steps, whose gradients are large without anything being wrong, counted as outliers; or
    a later outlier missed."""
    norms = [50.0, 40.0, *[1.0] * 36, 7.0, 1.0]  # a twentieth of 40 steps: 2
    assert recorded(tmp_path / "run", [{"grad_norm": norm} for norm in norms]).largest_gradient == 7.0


def test_what_was_not_recorded_is_not_made_up(tmp_path):
    """Fault: 0.0 where a strategy draws nothing by utility."""
    run = recorded(tmp_path / "run", [{}, {}])
    assert (run.selected_share, run.entropy_ratio, run.largest_gradient) == ({}, None, None)
