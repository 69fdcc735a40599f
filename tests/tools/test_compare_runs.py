"""tools/compare_runs.py on runs written by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import compare_runs

from megatron_opus.runs.curves import first_reached

CONFIG = "name: x\nmodel: {num_layers: 1, hidden_size: 8, num_attention_heads: 1}\nselection: {strategy: STRATEGY}\n"


def write_run(directory: Path, losses: dict[int, float], *, strategy: str = "opus", tokens: int = 100) -> Path:
    """A run that evaluates `prose` (and `code`, always 5.0) at the given steps, of `tokens` update tokens each."""
    directory.mkdir()
    (directory / "config.yaml").write_text(CONFIG.replace("STRATEGY", strategy))
    rows: list[dict[str, Any]] = []
    for step in range(max(losses) + 1):
        rows.append({"step": step, "update_tokens": (step + 1) * tokens, "step_seconds": 0.5})
        if step in losses:
            rows[-1]["validation_loss"] = {"prose": losses[step], "code": 5.0}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_the_table_holds_both_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a comparison that reads the wrong row, swaps the arms or counts other arms' tokens."""
    opus = write_run(tmp_path / "a", {1: 4.0, 3: 2.0})
    random = write_run(tmp_path / "b", {1: 4.5, 3: 3.0}, strategy="random")
    assert compare_runs.main([str(opus), str(random)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "a opus 4 400 2.0" in lines
    assert "b random 4 400 2.0" in lines
    assert "a 2.0000 5.0000" in lines
    assert "b 3.0000 5.0000" in lines
    assert "first run - b -1.0000 +0.0000" in lines
    assert "update tokens first run needed to reach b 75% 50%" in lines  # prose is at 3.0 at 300 of 400 tokens
    assert not any("note:" in line for line in lines)


def test_unequal_budgets_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a loss that is lower because more was trained on."""
    runs = [write_run(tmp_path / "a", {1: 3.0}), write_run(tmp_path / "b", {3: 2.0})]
    assert compare_runs.main([str(r) for r in runs]) == 0
    out = capsys.readouterr().out
    assert "note: a and b trained on different numbers of tokens" in out
    assert "needed to reach b never" in " ".join(out.split())


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a traceback, or an empty table with status 0, for a mistyped name."""
    assert compare_runs.main([str(tmp_path / "nothing")]) == 1
    assert "expected the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("curve", "loss", "expected"),
    [
        ([(100, 4.0), (200, 2.0)], 3.0, 150.0),
        ([(100, 4.0), (200, 2.0)], 5.0, 100.0),
        ([(100, 4.0), (200, 2.0)], 1.0, None),
        ([(100, 4.0), (200, 4.0)], 4.0, 100.0),
        ([(100, 4.0), (200, 3.0), (300, 3.5)], 3.2, 180.0),
        ([(100, 4.0), (200, 4.0), (300, 3.0)], 3.5, 250.0),
    ],
)
def test_tokens_to_reach(curve: list[tuple[int, float]], loss: float, expected: float | None) -> None:
    """Guards against extrapolation, and against taking the last crossing for the first."""
    reached = first_reached(curve, loss)
    assert reached == (None if expected is None else pytest.approx(expected))
