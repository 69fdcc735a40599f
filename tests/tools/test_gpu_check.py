"""The check that waits for a GPU, rehearsed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_every_part_runs_in_a_rehearsal(tmp_path: Path) -> None:
    """Guards against a line that is tried for the first time on a rented card."""
    command = ["bash", "tools/gpu_check.sh", "--rehearse", "--parts", "precision", "cost", "syncs", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu_check_rehearsal.json").read_text())
    assert found["rehearsal"] is True
    (cost,) = found["parts"]["cost"]
    assert cost["tax"] > 0.5  # a pass costs about its own forward and backward; a busy machine blurs it
    assert cost["overhead"] > 0
    (precision,) = found["parts"]["precision"]
    assert precision["Spearman"] > 0.5
    assert found["parts"]["syncs"][0]["waits"] > 0
    page = (tmp_path / "gpu_check_rehearsal.md").read_text()
    assert "these numbers say nothing about a GPU" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """Guards against numbers of a CPU in a table that is read as a GPU's."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_opus", "gpu-check", "--output", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "expected a GPU, found none; --rehearse" in done.stderr
    assert not (tmp_path / "out").exists()
