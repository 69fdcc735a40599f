"""tools/report.py on a run of the trainer, and what it says when there is nothing to report."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import report  # noqa: E402

from megatron_opus.config import dump  # noqa: E402
from megatron_opus.runs.metrics import read_metrics  # noqa: E402

pytest.importorskip("matplotlib", reason="the report needs the extra `lab`")


@pytest.fixture(scope="module")
def folder(embedded_cache, tmp_path_factory) -> Path:
    """Five real steps with an evaluation after every other one."""
    root = tmp_path_factory.mktemp("reported")
    settings = recipe(embedded_cache, root, "real", training={"train_steps": 5, "eval_interval": 2})
    (root / "recipe.yaml").write_text(dump(settings))
    command = [sys.executable, "-m", "megatron_opus.training", str(root / "recipe.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root / "real"


def test_a_run_of_the_trainer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a report that reads names which a run no longer writes, and says so only by being empty."""
    output = tmp_path / "r.html"
    assert report.main([str(folder), "--output", str(output)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(output)
    assert said.err == ""
    page = output.read_text(encoding="utf-8")
    last = read_metrics(folder)[-1]
    assert f'<td class="n">{last["validation_loss"]["prose"]:.4f}</td>' in page
    for part in (
        "prose (target): nats per token against update tokens",
        "Entropy of the draw",
        "Redundancy in what decided the draw",
        "real: standardised utility",
        "documents were offered",
        "tensor_model_parallel_size",
        '<th scope="row">device</th>',
        "the rest of choosing",
        f"python tools/report.py {folder} --output {output}",
    ):
        assert part in page, part
    assert "nothing is shown" not in page


def test_a_run_that_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a page that can be made only when the run is over."""
    shutil.copytree(folder, tmp_path / "going")
    (tmp_path / "going/ledger/steps-00000000-00000004.parquet").unlink()
    metrics = tmp_path / "going/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))
    assert report.main([str(tmp_path / "going"), "--output", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().err
    assert "note: going: Recorded up to step 1 of 5" in said
    assert "No validation loss" in said
    assert "No part of ledger/" in said


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a traceback, or status 0, for a mistyped name."""
    output = tmp_path / "r.html"
    assert report.main([str(tmp_path / "none"), "--output", str(output)]) == 1
    assert "report: " in capsys.readouterr().err
    assert not output.exists()
