"""The command line of the evaluation: what it takes, what it says, its exit status."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import evaluate  # noqa: E402


def test_errors_are_one_line_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a traceback for a mistyped path, a broken file, an answer out of range or an unknown benchmark."""
    broken, far, other = (tmp_path / f"{name}.jsonl" for name in ("broken", "far", "other"))
    good = '{"query": "a?", "choices": ["b", "c"], "gold": 1}\n'
    broken.write_text(good + '{"query": "a?", "choices"\n')
    far.write_text(good + good.replace("1", "2"))
    other.write_text('{"prompt": "a?", "answers": ["b"]}\n')
    for file, expected in (
        (broken, "broken.jsonl:2: not one JSON object per line"),
        (far, "far.jsonl:2: 'gold': expected 0..1, got 2"),
        (other, "is none of mmlu, anli"),
        (tmp_path / "none.jsonl", "none.jsonl: no such file"),
    ):
        assert evaluate.main([str(tmp_path), "--benchmarks", f"mine={file}"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("evaluate: ")
        assert expected in said
    assert evaluate.main([str(tmp_path)]) == 1
    assert "expected a complete checkpoint, found none" in capsys.readouterr().err
    assert evaluate.main([str(tmp_path / "mistyped")]) == 1
    assert "mistyped: no such run folder" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path), "--benchmarks", "arc_easy"])
    assert "expected NAME=FILE, got 'arc_easy'" in capsys.readouterr().err
