"""tools/experiment.py on a very small experiment, with real runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import experiment

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


def write(path: Path, cache: Path, **changes: Any) -> Path:
    raw: dict[str, Any] = {
        "name": "mini",
        "hypothesis": "the laboratory works",
        "metric": ["prose"],
        "stopping_rule": f"{STEPS} steps with two seeds",
        "recipe": str(ROOT / "configs/pretrain_gpt2_tiny.yaml"),
        "settings": {
            "model.num_layers": 1,
            "model.hidden_size": 32,
            "model.num_attention_heads": 2,
            "data.cache_dir": str(cache),
            "data.seq_length": 32,
            "training.train_steps": STEPS,
            "training.global_batch_size": 8,
            "training.eval_interval": 4,
            "training.eval_sequences": 16,
            "training.checkpoint_interval": 8,
            "training.tensorboard": False,
            "selection.score_length": 32,
        },
        "baseline": "random",
        "seeds": [1, 2],
        "arms": {"random": {"selection.strategy": "random"}, "opus": {"selection.strategy": "opus"}},
        **changes,
    }
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def call(file: Path, output: Path, *more: str) -> int:
    jobs = str(min(2, len(os.sched_getaffinity(0))))
    return experiment.main([str(file), "--output", str(output), "--jobs", jobs, "--no-pictures", *more])


@pytest.fixture(scope="module")
def done(embedded_cache, tmp_path_factory) -> tuple[Path, Path]:
    """The file and the output folder of two arms and two seeds, trained."""
    root = tmp_path_factory.mktemp("experiment")
    file = write(root / "mini.yaml", embedded_cache)
    assert call(file, root) == 0
    return file, root


def test_arms_and_seeds_become_runs_and_a_table(done, capsys):
    """Fault: a run that is started twice, a seed that is not set, a report that leaves out what was announced."""
    file, root = done
    assert call(file, root) == 0  # nothing left to do
    said = capsys.readouterr().out
    assert "4 of 4 runs are finished and kept" in said
    assert "the laboratory works" in said
    data = json.loads((root / "mini/report.json").read_text())
    assert [(arm["arm"], arm["seeds"]) for arm in data["arms"]] == [("random", [1, 2]), ("opus", [1, 2])]
    assert len({run["loss"] for run in data["runs"]}) == 4
    assert all(run["update_tokens"] == STEPS * 8 * 32 and len(run["by_seconds"]) == 5 for run in data["runs"])
    assert data["arms"][1]["scoring_share"]["mean"] > 0.1
    for run in ("random-1", "opus-2"):
        found = {p.name for p in (root / "mini" / run).iterdir()}
        assert {"config.yaml", "metrics.jsonl", "ledger", "checkpoints"} <= found


def test_an_interrupted_run_is_resumed_and_a_failing_arm_is_listed(done, embedded_cache, tmp_path, capsys):
    """Fault: an interrupted run left out, or begun again over its record; an arm that cannot run dropped in silence."""
    _, root = done
    shutil.copytree(root / "mini", tmp_path / "mini")
    before = json.loads((root / "mini/report.json").read_text())
    killed = tmp_path / "mini/opus-2"
    rows = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(rows[:17]))
    shutil.rmtree(killed / "checkpoints/step_00000020")
    file = write(
        tmp_path / "mini.yaml",
        embedded_cache,
        arms={
            "random": {"selection.strategy": "random"},
            "opus": {"selection.strategy": "opus"},
            "broken": {"data.domain_weights": {"nowhere": 1.0}},
        },
    )
    folders = [tmp_path / f"mini/{arm}-{seed}" for arm in ("random", "opus") for seed in (1, 2)]
    for folder in folders:  # a copied run is the same run: only its folder's path differs
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace(str(root), str(tmp_path)))
    assert call(file, tmp_path) == 3
    said = capsys.readouterr().out
    assert "opus-2: resumes" in said
    assert "3 of 6 runs are finished and kept" in said
    after = json.loads((tmp_path / "mini/report.json").read_text())
    assert {(r["arm"], r["seed"]): r["loss"] for r in after["runs"]} == {
        (r["arm"], r["seed"]): r["loss"] for r in before["runs"]
    }
    assert [item["run"] for item in after["failed"]] == ["broken-1", "broken-2"]
    assert all("no candidate domain 'nowhere'" in item["why"] for item in after["failed"])
    assert after["added_later"] == ["broken-1", "broken-2"]


def test_pictures(done):
    """Fault: an empty picture, or one that only a machine with a display can make."""
    pytest.importorskip("matplotlib", reason="pictures need the extra `lab`")
    file, root = done
    assert experiment.main([str(file), "--output", str(root), "--report-only"]) == 0
    from matplotlib import image

    for name in ("loss_tokens.png", "loss_seconds.png"):
        pixels = image.imread(root / "mini" / name)
        assert pixels.shape[0] > 400
        assert pixels.std() > 0.05


def test_what_cannot_be_read_is_said(tmp_path, capsys):
    """Fault: a traceback, or status 0, for a file that is no experiment."""
    (tmp_path / "x.yaml").write_text("name: x\n")
    assert call(tmp_path / "x.yaml", tmp_path) == 1
    assert "hypothesis is missing" in capsys.readouterr().err
