"""The weights inside a checkpoint of Megatron's engine (`torch_dist`), read without Megatron and without processes.

A checkpoint holds tensors of the whole model, whatever layout wrote it: `.metadata` says which chunks each has, and in
which file and at which place a chunk lies. Megatron stacks the layers of a model, and keeps the norms before the
attention and the MLP under the names of the layers that follow them:

    decoder.layers.3.mlp.linear_fc2.weight   ->  decoder.layers.mlp.linear_fc2.weight, number 3 of the first dimension
    decoder.layers.3.input_layernorm.weight  ->  decoder.layers.self_attention.linear_qkv.layer_norm_weight, number 3
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from megatron_opus.backends.formats.torch_files import METADATA, load_metadata
from megatron_opus.errors import CheckpointError
from megatron_opus.types import Ranges

_BEFORE = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class TorchDistTensors:
    """Reads any part of the whole parameters in one `engine/` directory, by the names of the whole model."""

    def __init__(self, directory: Path) -> None:
        """Read `.metadata`. Raises CheckpointError where it is missing, torn, or names anything but data."""
        self._directory = directory
        metadata = load_metadata(directory / METADATA)
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if hasattr(v, "chunks")}
        self._places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a whole parameter; None for one that is not there."""
        key, layer = _stacked(name)
        found = self._tensors.get(key)
        if found is None or (layer is not None and layer >= found.size[0]):
            return None
        return tuple(found.size[0 if layer is None else 1 :])

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[_stacked(name)[0]].properties.dtype

    def read(self, name: str, *ranges: Ranges) -> Tensor:
        """Copy the given ranges of the first dimensions, laid end to end; the others whole.

        Example: `read("output_layer.weight", ((0, 2), (8, 1)))` gives rows 0, 1 and 8. Raises CheckpointError where the
        chunks do not cover them.
        """
        shape = self.shape(name)
        assert shape is not None, name
        wanted = [*ranges, *(((0, n),) for n in shape[len(ranges) :])]
        key, layer = _stacked(name)
        out = torch.empty([sum(n for _, n in dim) for dim in wanted], dtype=self.dtype(name))
        filled = 0
        for chunk in self._tensors[key].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            inside = offsets[1:] if layer is not None else offsets
            if layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]:
                continue
            cuts = [
                _common(dim, start, n)
                for dim, start, n in zip(wanted, inside, sizes[len(sizes) - len(inside) :], strict=True)
            ]
            if not all(cuts):
                continue
            values = self._chunk(key, offsets)
            values = values if layer is None else values[layer - offsets[0]]
            filled += _place(out, values, cuts)
        if filled != out.numel():
            raise CheckpointError(
                f"{self._directory}: expected {out.numel()} numbers of {name}, found {filled}; a file of the "
                "checkpoint is missing or belongs to another one"
            )
        return out

    def _chunk(self, key: str, offsets: tuple[int, ...]) -> Tensor:
        place = self._places[key, offsets]
        path = self._directory / place.relative_path
        if path.resolve().parent != self._directory.resolve():
            raise CheckpointError(f"{self._directory}: {key} lies in {place.relative_path}, out of its folder")
        try:
            with path.open("rb") as stream:
                stream.seek(place.offset)
                return torch.load(io.BytesIO(stream.read(place.length)), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for torn files
            raise CheckpointError(f"{path}: {key} cannot be read ({str(error).splitlines()[0]})") from error


def _stacked(name: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(decoder\.layers\.)(\d+)\.(.*)", name)
    if found is None:
        return name, None
    rest = found[3]
    for own, stored in _BEFORE.items():
        rest = rest.replace(own, stored) if rest.startswith(own) else rest
    return found[1] + rest, int(found[2])


def _common(wanted: Ranges, start: int, length: int) -> list[tuple[int, int, int]]:
    """List (place in the wanted ranges laid end to end, place in the chunk, length) of what a chunk has of them."""
    found, to = [], 0
    for first, n in wanted:
        low, high = max(first, start), min(first + n, start + length)
        if low < high:
            found.append((to + low - first, low - start, high - low))
        to += n
    return found


def _place(out: Tensor, values: Tensor, cuts: list[list[tuple[int, int, int]]]) -> int:
    """Copy every combination of the cuts of all dimensions; return how many numbers that were."""
    if not cuts:
        out.copy_(values)
        return 1
    count = 0
    rest = cuts[1:]
    for to, at, n in cuts[0]:
        if rest:
            for column_to, column_at, width in rest[0]:
                out[to : to + n, column_to : column_to + width] = values[at : at + n, column_at : column_at + width]
                count += n * width * math.prod(out.shape[2:])
        else:
            out[to : to + n] = values[at : at + n]
            count += n
    return count
