"""The command line of the conversion: what it prints, and its exit status."""

from __future__ import annotations

import sys
from pathlib import Path

import hf_models
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import convert_checkpoint  # noqa: E402


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: an option that does not reach the conversion, or a success that is not said."""
    source = hf_models.save(tmp_path / "hf", "gpt2")
    ours, back = tmp_path / "ours", tmp_path / "back"
    there = ["hf-to-opus", "--input", str(source), "--output", str(ours), "--tensor-model-parallel-size", "2"]
    assert convert_checkpoint.main([*there, "--make-vocab-size-divisible-by", "32", "--precision", "bf16"]) == 0
    assert (ours / "tp_01_of_02.safetensors").is_file()
    assert f"{ours}: 56 tensors" in capsys.readouterr().out
    assert convert_checkpoint.main(["opus-to-hf", "--input", str(ours), "--output", str(back)]) == 0
    want, got = hf_models.raw_tensors(source), hf_models.raw_tensors(back)
    assert all(torch.equal(got[name], value.bfloat16()) for name, value in want.items())
    assert convert_checkpoint.main([*there, "--precision", "fp32"]) == 1
    assert f"{ours} exists" in capsys.readouterr().err
    assert convert_checkpoint.main([*there, "--precision", "fp32", "--overwrite"]) == 0


def test_nothing_to_convert_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a traceback for a mistyped path."""
    for command in ("hf-to-opus", "opus-to-hf"):
        nothing = [command, "--input", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
        assert convert_checkpoint.main(nothing) == 1
        assert "none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "run/checkpoints/step_00000003").mkdir(parents=True)
    assert (
        convert_checkpoint.main(["opus-to-hf", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "o")]) == 1
    )
    assert "expected a complete checkpoint, found none" in capsys.readouterr().err
