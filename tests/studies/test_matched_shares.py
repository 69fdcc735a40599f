"""Arms that take the realised domain shares of another arm, and what a corpus hides within a domain."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from test_lab import experiment_file, write_run

from megatron_opus import config as configs
from megatron_opus.config import DataConfig
from megatron_opus.studies.lab import experiment, matched_shares, report, runner

ARMS = {
    "random_matched": {"selection.strategy": "random", "selection.rho": 1.0, "shares_of": "opus"},
    "random": {"selection.strategy": "random"},
    "opus": {},
}


def write_shares(directory: Path, rows: list[dict[str, object]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": i, **row}) + "\n" for i, row in enumerate(rows)]
    (directory / "metrics.jsonl").write_text("".join(lines))


def test_shares_become_a_schedule_of_blocks(tmp_path):
    """Guards against shares of the buffer instead of what was trained on, of unweighted counts where the losses were
    weighted, and blocks that lie a step off."""
    rows = [{"selected_share": {"a": 0.25, "b": 0.75}}] * 10
    rows += [{"selected_share": {"a": 0.0, "b": 1.0}, "weighted_share": {"a": 1.0, "b": 0.0}}] * 5
    write_shares(tmp_path, rows)
    overrides = matched_shares.matched_overrides(tmp_path)
    recipe = Path(__file__).resolve().parents[2] / "configs/pretrain_gpt2_tiny.yaml"
    data = configs.load(recipe, ("data.domain_weights={a: 1}", *overrides)).data
    assert data.domain_weights is None
    assert data.domain_schedule.points == {"step 0": {"a": 0.25, "b": 0.75}, "step 10": {"a": 1.0, "b": 0.0}}
    assert isinstance(data, DataConfig)
    write_shares(tmp_path, [{"loss": 1.0}])
    with pytest.raises(experiment.LabError, match="expected selected_share"):
        matched_shares.matched_overrides(tmp_path)


def test_a_matched_arm_waits_for_the_run_of_its_seed(tmp_path, monkeypatch):
    """Guards against shares of another seed, of an unfinished run, and a schedule that the record does not tell."""
    found = experiment.read_experiment(experiment_file(tmp_path, seeds=[1, 2], arms=ARMS))
    runs = found.runs(tmp_path / "out" / "mini", None)
    assert [run.name for run in runs][:3] == ["random_matched-1", "random-1", "opus-1"]
    record = experiment.record(found, runs, tmp_path / "out" / "mini")
    assert record["runs"]["random_matched-2"]["shares_of"] == "opus-2"
    commands: dict[str, list[str]] = {}

    class Ended(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **_: object) -> None:
            super().__init__(["true"])
            run = next(r for r in runs if f'name="{r.name}"' in command)
            commands[run.name] = command
            if run.name != "opus-2":
                write_run(run, {3: 3.0}, 1.0)
                rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
                write_shares(run.directory, [{**row, "selected_share": {"a": 0.5, "b": 0.5}} for row in rows])

    monkeypatch.setattr(runner.subprocess, "Popen", Ended)
    runner.run_all(runs, jobs=2, say=lambda text: None)
    assert [*commands].index("opus-1") < [*commands].index("random_matched-1")
    assert any(part.startswith("data.domain_schedule=") for part in commands["random_matched-1"])
    assert not any(part.startswith("data.domain_schedule=") for part in commands["random-1"])
    assert "random_matched-2" not in commands
    assert runner.why_unfinished(runs[3]) == "not started: opus-2 is not finished"
    results = report.collect(found, [run for run in runs if run.seed == 1], record)
    assert [arm.arm for arm in results.arms] == [*ARMS]


def test_the_arm_can_be_added_to_any_protocol(tmp_path):
    """Guards against an arm that takes other things than the mixture from the arm that it is matched to."""
    arms = {"random": {"selection.strategy": "random"}, "opus": {"selection.temperature": 0.5, "data.seq_length": 64}}
    found = experiment.read_experiment(experiment_file(tmp_path, arms=arms)).with_matched("opus")
    assert found.arms["random_matched_opus"] == {
        "data.seq_length": 64,
        "selection.strategy": "random",
        "selection.rho": 1.0,
        "shares_of": "opus",
    }
    assert found.contrasts == (("opus", "random_matched_opus"),)
    with pytest.raises(experiment.LabError, match="no arm 'random_matched_opus' whose shares"):
        found.with_matched("random_matched_opus")
    for other in ("opsu", "random_matched"):
        path = experiment_file(tmp_path, arms={**ARMS, "random_matched": {"shares_of": other}})
        with pytest.raises(experiment.LabError, match="expected an arm that takes no shares itself"):
            experiment.read_experiment(path)
