"""NVIDIA's optional GPU packages: which are installed, which are what they claim to be, and what is used instead.

The name `apex` on PyPI belongs to a web framework. A package is looked at before it is imported, and counts only when
the thing that is needed from it exists.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

APEX_REMEDY = (
    "the installed package `apex` is not NVIDIA's (PyPI's `apex` is an unrelated web framework): run `pip uninstall "
    "apex` and, on a GPU machine, build NVIDIA's from https://github.com/NVIDIA/apex with "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)


@dataclass(frozen=True, kw_only=True)
class Extra:
    """One optional package as found on this machine."""

    name: str
    status: Literal["verified", "absent", "refused", "broken"]
    detail: str  # version, or why it is not used and what to do


def detect_apex() -> Extra:
    """NVIDIA Apex, verified by its FusedAdam; `refused` for the unrelated package of the same name."""
    spec = _find("apex")
    if spec is None:
        return Extra(name="apex", status="absent", detail="NVIDIA Apex is not installed")
    # Looked up on disk: importing the unrelated package would run a stranger's code.
    places = [Path(p) for p in spec.submodule_search_locations or ()]
    if not any((p / "optimizers" / "fused_adam.py").is_file() for p in places):
        return Extra(name="apex", status="refused", detail=APEX_REMEDY)
    if not torch.cuda.is_available():
        return Extra(name="apex", status="broken", detail="needs an NVIDIA GPU, none was found")
    try:
        module = importlib.import_module("apex.optimizers")
        # FusedAdam imports without its compiled half and fails at its first construction: construct one.
        module.FusedAdam([torch.nn.Parameter(torch.zeros(1, device="cuda"))])
    except Exception as error:
        return Extra(
            name="apex",
            status="broken",
            detail=f"apex.optimizers.FusedAdam cannot be used ({type(error).__name__}: {error}); rebuild Apex with "
            "APEX_CPP_EXT=1 APEX_CUDA_EXT=1",
        )
    return Extra(name="apex", status="verified", detail="apex.optimizers.FusedAdam")


def detect_transformer_engine() -> Extra:
    """NVIDIA Transformer Engine, verified by its attention module and Megatron's adapter over it."""
    name = "transformer_engine"
    if _find(name) is None:
        return Extra(name=name, status="absent", detail="Transformer Engine is not installed")
    if not torch.cuda.is_available():
        return Extra(name=name, status="broken", detail="needs an NVIDIA GPU, none was found")
    try:
        engine = importlib.import_module("transformer_engine.pytorch")
        _ = engine.DotProductAttention
        adapter = importlib.import_module("megatron.core.extensions.transformer_engine")
        _ = adapter.TEDotProductAttention
    except Exception as error:
        return Extra(
            name=name,
            status="broken",
            detail=f"transformer_engine.pytorch.DotProductAttention cannot be used ({type(error).__name__}: {error}); "
            "reinstall with pip install --no-build-isolation transformer_engine[pytorch]",
        )
    return Extra(name=name, status="verified", detail=str(getattr(engine, "__version__", "")) or "importable")


def attention_backend(asked: str, transformer_engine: Extra) -> Literal["sdpa", "transformer_engine"]:
    """What `model.attention_backend` comes to on this machine. Raises RuntimeError for one that is not there."""
    if asked == "sdpa":
        return "sdpa"
    if transformer_engine.status == "verified":
        return "transformer_engine"
    if asked == "transformer_engine":
        raise RuntimeError(
            f"model.attention_backend: transformer_engine was asked for but {transformer_engine.detail}; set "
            "model.attention_backend=auto or sdpa, or install Transformer Engine"
        )
    return "sdpa"


def adamw(groups: list[dict[str, Any]], apex: Extra, **hyper: Any) -> tuple[torch.optim.Optimizer, str]:
    """The fastest AdamW that this machine has, and what it is. `hyper`: lr, betas, eps.

    CUDA: NVIDIA's FusedAdam when verified, else PyTorch's fused AdamW. CPU: PyTorch's AdamW.
    """
    if apex.status == "verified":
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
        return fused_adam(groups, adam_w_mode=True, **hyper), "NVIDIA Apex FusedAdam"
    if torch.cuda.is_available():
        return torch.optim.AdamW(groups, fused=True, **hyper), "PyTorch AdamW (fused)"
    return torch.optim.AdamW(groups, **hyper), "PyTorch AdamW"


def host_adamw(groups: list[dict[str, Any]], **hyper: Any) -> tuple[torch.optim.Optimizer, str]:
    """AdamW over tensors in host memory, and what it is: DeepSpeed's vectorised one beside a GPU, PyTorch's without.

    DeepSpeed compiles its own on first use (minutes, and a compiler is needed); where there is nothing to offload
    from, that buys nothing. Raises what DeepSpeed's build raises.
    """
    if torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **hyper), "DeepSpeed CPU AdamW"
    return torch.optim.AdamW(groups, **hyper), "PyTorch AdamW on the host"


def report(asked_attention: str = "auto") -> list[tuple[str, str, str]]:
    """(package, status, what is used) for the start-up lines. Raises as `attention_backend` does."""
    apex, engine = detect_apex(), detect_transformer_engine()
    optimizer = (
        "optimizer: NVIDIA Apex FusedAdam"
        if apex.status == "verified"
        else f"optimizer: PyTorch AdamW{' (fused)' if torch.cuda.is_available() else ''}; {apex.detail}"
    )
    chosen = attention_backend(asked_attention, engine)
    used = "Transformer Engine" if chosen == "transformer_engine" else "PyTorch scaled_dot_product_attention"
    attention = f"attention: {used}" + ("" if chosen == "transformer_engine" else f"; {engine.detail}")
    return [("NVIDIA Apex", apex.status, optimizer), ("Transformer Engine", engine.status, attention)]


def _find(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
