from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from megatron_opus.backends.model import extras


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of fake packages in front of everything on sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] in ("apex", "transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return tmp_path


def test_the_other_apex_is_refused(packages: Path) -> None:
    """`pip install apex` gives a web framework: taken for NVIDIA's, it is imported and fails in the optimizer."""
    (packages / "apex").mkdir()
    (packages / "apex" / "__init__.py").write_text("raise SystemExit('imported a stranger')\n")
    found = extras.detect_apex()
    assert found.status == "refused"
    assert "pip uninstall apex" in found.detail
    assert "https://github.com/NVIDIA/apex" in found.detail
    optimizer, name = extras.adamw([{"params": [torch.nn.Parameter(torch.zeros(2))]}], found, lr=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert name.startswith("PyTorch AdamW")
    row = next(r for r in extras.report() if r[0] == "NVIDIA Apex")
    assert row[1] == "refused"
    assert "pip uninstall apex" in row[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fake FusedAdam would be constructed")
def test_apex_without_a_gpu(packages: Path) -> None:
    """An importable FusedAdam on a machine without a GPU fails at the first step, after the data is prepared."""
    (packages / "apex" / "optimizers").mkdir(parents=True)
    (packages / "apex" / "__init__.py").write_text("")
    (packages / "apex" / "optimizers" / "__init__.py").write_text("")
    (packages / "apex" / "optimizers" / "fused_adam.py").write_text("")
    assert extras.detect_apex().status == "broken"


def test_attention_that_was_asked_for() -> None:
    """Falling back from a backend that was named trains something else than the recipe says."""
    absent = extras.Extra(name="transformer_engine", status="absent", detail="Transformer Engine is not installed")
    there = extras.Extra(name="transformer_engine", status="verified", detail="2.0")
    assert extras.attention_backend("auto", absent) == "sdpa"
    assert extras.attention_backend("auto", there) == "transformer_engine"
    assert extras.attention_backend("sdpa", there) == "sdpa"
    with pytest.raises(RuntimeError, match="was asked for but Transformer Engine is not installed; set"):
        extras.attention_backend("transformer_engine", absent)


def test_report_names_both_and_what_is_used() -> None:
    """A package that is silently missing makes a run slower than the last one, and nobody knows why."""
    rows = extras.report("sdpa")
    assert [r[0] for r in rows] == ["NVIDIA Apex", "Transformer Engine"]
    assert "optimizer: " in rows[0][2]
    assert "attention: PyTorch scaled_dot_product_attention" in rows[1][2]


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")
def test_transformer_engine_is_verified() -> None:
    """Importable is not usable: the attention module and Megatron's adapter must both be there."""
    assert extras.detect_transformer_engine().status in ("verified", "broken")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_optimizer_on_a_gpu() -> None:
    """An optimizer that cannot take a step on the device it was chosen for."""
    parameter = torch.nn.Parameter(torch.ones(4, device="cuda"))
    optimizer, _ = extras.adamw([{"params": [parameter]}], extras.detect_apex(), lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (parameter < 1).all()
