"""safetensors files: slices read lazily, tensors written one at a time. Never more than one tensor is in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_opus.config import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BAND = 8 * 2**20  # bytes copied at a time
_HELD = 16 * 2**20  # bytes read through one mapping before it is given back


class WeightFileError(ConfigError):
    """A weight file that is missing, truncated or not what its index says."""


class SafetensorsFiles:
    """The tensors of a directory: one file, or several under an index. Only headers are read until `read`."""

    def __init__(self, directory: Path, files: Sequence[str] | None = None) -> None:
        """`files`: names in the directory; default: what a Hugging Face directory has. Raises WeightFileError."""
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        indexed = _index(directory) if files is None else None
        for name in files if files is not None else _files(directory, indexed):
            self._scan(directory / name)
        if indexed is not None:
            absent = [f"{t} (in {f})" for t, f in indexed.items() if self._where.get(t) != directory / f]
            if absent:
                raise WeightFileError(f"{directory / INDEX} names tensors that are not there: {', '.join(absent[:10])}")

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """A copy of the (start, length) ranges of the first dimensions, the others whole."""
        given = [slice(start, start + length) for start, length in ranges]
        rest = [slice(0, n) for n in self._shapes[name][len(given) :]]
        first, *others = given + rest
        size = [first.stop - first.start, *(x.stop - x.start for x in others)]
        out = torch.empty(size, dtype=self._dtypes[name])
        # In bands: the pages of a mapping count as this process's memory for as long as it is held.
        rows = max(1, _BAND * size[0] // max(1, out.numel() * out.element_size()))
        for at in range(0, size[0], rows):
            band = slice(first.start + at, min(first.start + at + rows, first.stop))
            out[at : at + rows] = self._mapped(self._where[name]).get_slice(name)[(band, *others)]
            self._read += out[at : at + rows].numel() * out.element_size()
        return out

    def _mapped(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path or self._read > _HELD:
            self.close()
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1]

    def close(self) -> None:
        """Give back what is mapped; reading opens again."""
        self._open, self._read = None, 0

    def _scan(self, path: Path) -> None:
        if not path.is_file():
            raise WeightFileError(f"{path}: no such file; is the download complete?")
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    if name in self._where:
                        raise WeightFileError(f"{path}: tensor {name} is in {self._where[name].name} as well")
                    view = file.get_slice(name)
                    if view.get_dtype() not in DTYPES:
                        raise WeightFileError(
                            f"{path}: tensor {name}: expected {', '.join(DTYPES)}, got {view.get_dtype()}"
                        )
                    self._where[name] = path
                    self._shapes[name] = tuple(view.get_shape())
                    self._dtypes[name] = DTYPES[view.get_dtype()]
        except (safetensors.SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise WeightFileError(
                f"{path}: {size} bytes are not a whole safetensors file ({error}); download or copy it again"
            ) from error


def _index(directory: Path) -> dict[str, str] | None:
    # `transformers` reads the single file where both are there.
    if (directory / SINGLE).is_file() or not (directory / INDEX).is_file():
        return None
    path = directory / INDEX
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        where = {str(tensor): str(file) for tensor, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightFileError(f"{path}: expected JSON with a weight_map, got an error: {error}") from error
    for tensor, file in where.items():
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise WeightFileError(f"{path}: weight_map.{tensor}: expected the name of a file beside it, got {file!r}")
    return where


def _files(directory: Path, index: Mapping[str, str] | None) -> list[str]:
    if index is not None:
        return sorted(set(index.values()))
    if (directory / SINGLE).is_file():
        return [SINGLE]
    old = sorted(p.name for p in directory.glob("*.bin"))
    hint = (
        f"; {old[0]} is a pickle, which is not read: save the model again with save_pretrained of transformers"
        if old
        else ""
    )
    raise WeightFileError(f"{directory}: expected {SINGLE} or {INDEX}, found neither{hint}")


class SafetensorsWriter:
    """One file, its tensors written in the order in which they were announced; whole and on the disk after `with`."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._expected = dict(tensors)
        self._left = list(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            size = tensor_bytes(dtype, shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._path = path
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a tensor that is not the next announced one."""
        dtype, shape = self._expected[name]
        if self._left.pop(0) != name or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{self._path}: {name}: expected {dtype} {shape}, got {tensor.dtype} {tensor.shape}")
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None and self._left:
                raise ValueError(f"{self._path}: tensors not written: {', '.join(self._left[:10])}")
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


def tensor_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
