"""Files of `torch.save`, read so that nothing in them can run code.

A pickle names the Python objects that build its contents. Reading here is torch's own `weights_only` reader, which
builds tensors and plain containers, and beside them only what the lists below name. What a host library reads by
itself, with a full unpickler, is looked through first: `refuse_code` lists the names without loading anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_opus.errors import CheckpointError

# numpy's arrays: random states, positions in the data
_NUMPY = ("numpy.ndarray", "numpy._core.multiarray._reconstruct", "numpy.dtype")
_NUMPY_TYPES = tuple(f"numpy.dtypes.{kind}DType" for kind in ("UInt32", "Int64", "Int32", "Bool", "Float64"))
# records without behaviour that DeepSpeed keeps beside its tensors
_DEEPSPEED = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
)
PLAIN = (*_NUMPY, *_NUMPY_TYPES, *_DEEPSPEED)
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".distcp", ".pkl", ".metadata")


def load_plain(path: Path, *, mmap: bool = False) -> Any:
    """Load tensors, numbers, text, numpy arrays and containers of them, on the CPU.

    Raises CheckpointError for a file that holds anything else or cannot be read.
    """
    refuse_code([path])
    with safe_globals([_named(name) for name in PLAIN]):
        try:
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        except Exception as error:  # torch raises many kinds for torn files
            raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def refuse_code(paths: Iterable[Path]) -> None:
    """Raise CheckpointError for the first file that names an object beyond tensors and the lists above.

    Nothing is loaded: the names are read off the pickle's instructions.
    """
    for path in paths:
        try:
            found = sorted(set(get_unsafe_globals_in_checkpoint(path)) - {*PLAIN})
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            raise CheckpointError(
                f"{path}: expected a file that torch.save wrote ({str(error).splitlines()[0]}); other pickles are not "
                "read, since they can run code"
            ) from error
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise CheckpointError(
                f"{path}: expected tensors and plain values, found {', '.join(found[:5])}{more}, which could run code; "
                "if you made this checkpoint yourself and trust it, resume with --trust-checkpoint"
            )


def pickles_below(directory: Path) -> list[Path]:
    """List the files below `directory` that a host library may unpickle, in name order."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.suffix in SUFFIXES)


def _named(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
