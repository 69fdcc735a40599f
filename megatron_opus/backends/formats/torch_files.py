"""Files of `torch.save`, read so that nothing in them can run code.

A pickle names the Python objects that build its contents. Reading here is torch's own `weights_only` reader, which
builds tensors and plain containers, and beside them only what the lists below name. What a host library reads by
itself, with a full unpickler, is looked through first: `refuse_code` lists the names without loading anything.
"""

from __future__ import annotations

import importlib
import io
import pickle
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
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# What PyTorch's distributed checkpoints (`torch_dist`) keep in `.metadata`, a plain pickle: which file holds what.
METADATA = ".metadata"
_DISTRIBUTED = {
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            *("Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata"),
            *("BytesStorageMetadata", "MetadataIndex", "StorageMeta"),
        )
    ),
    *("torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size"),
    *("pathlib.PosixPath", "pathlib.Path", "pathlib.PurePosixPath"),
}


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
        if path.name == METADATA:
            _refuse_code_of_parts(path)
            continue
        try:
            found = sorted(set(get_unsafe_globals_in_checkpoint(path)) - {*PLAIN})
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            raise CheckpointError(
                f"{path}: expected a file that torch.save wrote ({str(error).splitlines()[0]}); other pickles are not "
                "read, since they can run code"
            ) from error
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise CheckpointError(f"{path}: {_could_run_code(', '.join(found[:5]) + more)}")


def pickles_below(directory: Path) -> list[Path]:
    """List the files below `directory` that a host library may unpickle, in name order."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and (p.suffix in SUFFIXES or p.name == METADATA))


class _DistributedMetadata(pickle.Unpickler):
    """Reads `.metadata` with the classes of `_DISTRIBUTED` alone; anything else is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _DISTRIBUTED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(_could_run_code(full))


def load_metadata(path: Path) -> Any:
    """Read the `.metadata` of a distributed checkpoint (torch.distributed.checkpoint.metadata.Metadata).

    Raises CheckpointError for a file that is missing, torn, or names anything but its own kind of records.
    """
    try:
        with path.open("rb") as stream:
            return _DistributedMetadata(stream).load()
    except Exception as error:  # a torn pickle raises many kinds
        raise CheckpointError(f"{path}: {error}") from error


def _refuse_code_of_parts(path: Path) -> None:
    """Refuse code in `.metadata`, and in every piece of the files beside it that it points to."""
    pieces = dict(load_metadata(path).storage_data)
    try:
        for index, piece in pieces.items():
            file = path.parent / piece.relative_path
            if file.resolve().parent != path.parent.resolve():
                raise CheckpointError(f"{index.fqn} lies in {piece.relative_path}, out of its folder")
            with file.open("rb") as stream:
                stream.seek(piece.offset)
                found = set(get_unsafe_globals_in_checkpoint(io.BytesIO(stream.read(piece.length)))) - {*PLAIN}
            if found:
                raise CheckpointError(f"{index.fqn}: " + _could_run_code(", ".join(sorted(found)[:5])))
    except Exception as error:  # a torn pickle raises many kinds
        raise CheckpointError(f"{path}: {error}") from error


def _could_run_code(names: str) -> str:
    return (
        f"expected tensors and plain values, found {names}, which could run code; if you made this checkpoint yourself "
        "and trust it, resume with --trust-checkpoint"
    )


def _named(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
