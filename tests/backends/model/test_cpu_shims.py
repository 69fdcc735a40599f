from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from megatron_opus.config import ParallelConfig

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="shims are for machines without a GPU")


def _draw() -> list[bool]:
    return (functional.dropout(torch.ones(64), 0.5) > 0).tolist()


def dropout_masks(tp: int) -> dict[str, list[bool]]:
    """What this rank draws outside and inside a tensor-parallel region."""
    from megatron_opus.backends.model.parallel import init_parallel, rng_tracker

    init_parallel(ParallelConfig(tensor_model_parallel_size=tp), seed=3)
    outside = _draw()
    with rng_tracker().fork():
        inside = _draw()
    torch.manual_seed(0)
    with rng_tracker().fork():
        second = _draw()
    return {"outside": outside, "inside": inside, "second": second}


def test_tensor_parallel_dropout(world2: Any) -> None:
    """Megatron's own CPU tracker ignores names: every rank drops the same heads, or ranks drop different residuals."""
    a, b = world2.run(dropout_masks, 2)
    assert a["outside"] == b["outside"]
    assert a["inside"] != b["inside"]
    assert a["inside"] != a["second"]  # the state moves on
    again, _ = world2.run(dropout_masks, 2)
    assert again == a
    c, d = world2.run(dropout_masks, 1)
    assert c["outside"] != d["outside"]  # two data-parallel ranks


def test_shims_are_idempotent() -> None:
    """A second install that wraps the first would recurse in long-lived processes."""
    from megatron_opus.backends.model import cpu_shims

    assert cpu_shims.install()
    first = torch.cuda.current_device
    assert cpu_shims.install()
    assert torch.cuda.current_device is first
    assert str(torch.cuda.current_device()) == "cpu"
    tracker = cpu_shims.CpuRNGStatesTracker()
    tracker.add("a", 1)
    with pytest.raises(ValueError, match="expected a new name"):
        tracker.add("a", 2)
    with pytest.raises(KeyError, match="expected one of a"), tracker.fork("b"):
        pass


def test_shims_are_inert_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the replaced functions would send every tensor to the CPU."""
    from megatron_opus.backends.model import cpu_shims

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    assert not cpu_shims.install()
    assert torch.cuda.current_device is before
    with pytest.raises(RuntimeError, match="without accelerator"):
        cpu_shims.install_rng_tracker({})
