"""Weights in files, of which any rectangle of any whole parameter can be read, however the files cut them.

    source                                  cut by
    HfWeights       Hugging Face directory  published tensors (hf_layout.py)
    ShardedWeights  hf-to-opus directory    tensor-parallel degree of the conversion
    ShardedWeights  checkpoints/step_*      tensor-parallel degree of the run, under ZeRO 3 data-parallel parts as well
    MegatronWeights checkpoints/step_*      of Megatron's engine: chunks of the whole model's tensors

A rank that starts from such weights reads its own rows and columns only, so the degree need not be the files'.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_opus.backends.formats import hf_config, hf_layout
from megatron_opus.backends.formats.deepspeed_shards import DeepSpeedShards
from megatron_opus.backends.formats.safetensors_files import SafetensorsFiles
from megatron_opus.backends.formats.torch_dist import TorchDistTensors
from megatron_opus.backends.model.build import DTYPES
from megatron_opus.config import ConfigError, ModelConfig, RunConfig, from_dict
from megatron_opus.layout.model_layout import model_layout
from megatron_opus.runs import checkpoints
from megatron_opus.types import Ranges

WEIGHTS_FILE = "weights.json"
FORMAT = 1
_BAND_ROWS = 4096
LISTED = 20  # faults of one kind that an error lists


class WeightsError(ConfigError):
    """Lists the tensors that do not fit the model, with what was expected and what was found."""


class WeightSource(ABC):
    """Reads any part of the whole parameters of a model, whose vocabulary size is filled in."""

    def __init__(self, model: ModelConfig, where: Path) -> None:
        self.model, self.where = model, where
        self.layout = model_layout(model)

    def read(self, name: str, rows: Ranges, columns: Ranges | None = None) -> Tensor:
        """Copy [sum of rows, sum of columns] out of the whole parameter; columns None: all of them, or a vector.

        Rows of the vocabulary beyond `model.vocab_size` are zeros: no token has them, whatever a file holds there.
        """
        shape = self.layout[name].shape
        size = shape[0] - self.layout[name].padding
        if all(start + n <= size for start, n in rows):
            return self._read(name, rows, columns)
        width = shape[1] if columns is None else sum(n for _, n in columns)
        out = torch.zeros(sum(n for _, n in rows), width, dtype=self.dtype(name))
        at = 0
        for start, n in rows:
            for first in range(start, min(start + n, size), _BAND_ROWS):  # a second whole table would be the peak
                band = min(_BAND_ROWS, min(start + n, size) - first)
                out[at + first - start : at + first - start + band] = self._read(name, ((first, band),), columns)
            at += n
        return out

    def whole(self, name: str) -> Tensor:
        return self.read(name, ((0, self.layout[name].shape[0]),))

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype: ...

    @abstractmethod
    def _read(self, name: str, rows: Ranges, columns: Ranges | None) -> Tensor: ...


class HfWeights(WeightSource):
    """Reads a Hugging Face directory. Raises WeightsError listing missing, unexpected and ill-shaped tensors."""

    def __init__(self, directory: Path, *, make_vocab_size_divisible_by: int = 128) -> None:
        raw = hf_config.read_config(directory)
        model = hf_config.model_config(raw, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
        super().__init__(model, directory)
        self.layouts = hf_layout.layouts(self.model, self.layout)
        self._files = SafetensorsFiles(directory)
        self._absent_table = ""
        self._prefix = hf_layout.PREFIX[hf_config.family(self.model)]
        if not any(name.startswith(self._prefix) for name in self._files.names):
            self._prefix = ""  # saved from the model without its head, as the published GPT-2 files are
        # A tied model may be stored with its one table under the head's name alone.
        table = self.layouts["embedding.word_embeddings.weight"].pieces[0].tensor
        tied = not self.model.untie_embeddings_and_output_weights
        names = self._files.names
        if tied and hf_layout.HEAD in names and self._stored(table) not in names:
            self._absent_table = table
        self._check(hf_layout.published_shapes(self.layouts, self.layout))

    def dtype(self, name: str) -> torch.dtype:
        found = {self._files.dtype(self._stored(p.tensor)) for p in self.layouts[name].pieces}
        if len(found) > 1:
            raise WeightsError(f"{self.where}: {name} is made of tensors of several types: {sorted(map(str, found))}")
        return found.pop()

    def _stored(self, tensor: str) -> str:
        if tensor == self._absent_table:
            return hf_layout.HEAD
        full = hf_layout.PREFIX[hf_config.family(self.model)]
        return self._prefix + tensor.removeprefix(full) if tensor.startswith(full) else tensor

    def _check(self, published: Mapping[str, tuple[tuple[int, ...], bool]]) -> None:
        expected = {self._stored(tensor): shape for tensor, (shape, _) in published.items()}
        found = {name: self._files.shape(name) for name in self._files.names if not hf_layout.is_buffer(name)}
        tied_copy = hf_layout.HEAD in found and hf_layout.HEAD not in expected
        head = found.pop(hf_layout.HEAD) if tied_copy else None
        refuse_unless_equal(expected, found, f"{self.where} does not hold the tensors of its {hf_config.CONFIG_FILE}")
        if head is not None:
            self._check_tied(head)

    def _check_tied(self, head: tuple[int, ...]) -> None:
        """Compare the two copies that some tied checkpoints store; different ones would be another model."""
        table = self._stored(self.layouts[self.layout.output.name].pieces[0].tensor)
        same = head == self._files.shape(table)
        step = 4096
        for start in range(0, head[0] if same else 0, step):
            rows = (start, min(step, head[0] - start))
            same = same and torch.equal(self._files.read(hf_layout.HEAD, rows), self._files.read(table, rows))
        self._files.close()
        if not same:
            raise WeightsError(
                f"{self.where}: tie_word_embeddings is true, but {hf_layout.HEAD} and {table} differ; set it to false "
                "if the model was trained untied"
            )

    def _read(self, name: str, rows: Ranges, columns: Ranges | None) -> Tensor:
        layout = self.layouts[name]
        found = []
        for start, length in rows:
            at = 0
            for piece in layout.pieces:
                first, last = max(start, at), min(start + length, at + piece.length)
                if first < last:
                    part = (piece.start + first - at, last - first)
                    found.append(self._columns(self._stored(piece.tensor), part, columns, layout.transposed))
                at += piece.length
        return torch.cat(found) if len(found) > 1 else found[0]

    def _columns(self, tensor: str, rows: tuple[int, int], columns: Ranges | None, transposed: bool) -> Tensor:
        if transposed:
            wanted = columns or ((0, self._files.shape(tensor)[0]),)
            return torch.cat([self._files.read(tensor, c, rows) for c in wanted]).T
        if columns is None:
            return self._files.read(tensor, rows)
        return torch.cat([self._files.read(tensor, rows, c) for c in columns], dim=1)


class Shards(Protocol):
    """Reads local shards of every tensor-parallel rank."""

    def shapes(self, rank: int) -> Mapping[str, tuple[int, ...]]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, rank: int, name: str, *ranges: tuple[int, int]) -> Tensor: ...


class ConvertedShards:
    """Reads tp_RR_of_TT.safetensors, as hf-to-opus writes them."""

    def __init__(self, directory: Path, tp_size: int) -> None:
        self._files = [SafetensorsFiles(directory, [shard_file(rank, tp_size)]) for rank in range(tp_size)]

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {name: self._files[rank].shape(name) for name in self._files[rank].names}

    def dtype(self, name: str) -> torch.dtype:
        return self._files[0].dtype(name)

    def read(self, rank: int, name: str, *ranges: tuple[int, int]) -> Tensor:
        return self._files[rank].read(name, *ranges)


class ShardedWeights(WeightSource):
    """Puts parameters together from the shards of `tp_size` ranks. Raises WeightsError when a rank's do not fit."""

    def __init__(self, model: ModelConfig, where: Path, shards: Shards, tp_size: int) -> None:
        super().__init__(model, where)
        self._shards, self._sharded = shards, model_layout(model, tp_size=tp_size)
        expected = {p.name: self._sharded.local_shape(p.name) for p in self.layout.parameters}
        for rank in range(tp_size):
            refuse_unless_equal(expected, shards.shapes(rank), f"{where}: tensor-parallel rank {rank} of {tp_size}")

    def dtype(self, name: str) -> torch.dtype:
        return self._shards.dtype(name)

    def _read(self, name: str, rows: Ranges, columns: Ranges | None) -> Tensor:
        if self.layout[name].cut is None:
            return self._replicated(name, rows, columns)
        vector = len(self.layout[name].shape) == 1
        wanted = columns or (*self.layout.shard(name, 0), ((0, 1),))[1]
        out = torch.empty(sum(n for _, n in rows), sum(n for _, n in wanted), dtype=self.dtype(name))
        for rank in range(self._sharded.tp_size):
            held_rows, held_columns, *_ = (*self._sharded.shard(name, rank), ((0, 1),))  # a vector is one column
            for to, at, n in intersections(rows, held_rows):
                for to_column, at_column, width in intersections(wanted, held_columns):
                    ranges = ((at, n),) if vector else ((at, n), (at_column, width))
                    piece = self._shards.read(rank, name, *ranges)
                    out[to : to + n, to_column : to_column + width] = piece.view(n, width)
        return out[:, 0] if vector else out

    def _replicated(self, name: str, rows: Ranges, columns: Ranges | None) -> Tensor:
        copies = [self._shards.read(rank, name) for rank in range(self._sharded.tp_size)]
        for rank, copy in enumerate(copies):
            if not torch.equal(copy, copies[0]):
                raise WeightsError(
                    f"{self.where}: {name} is whole on every tensor-parallel rank, but rank {rank}'s differs from "
                    "rank 0's: the run had come apart before it was saved"
                )
        value = torch.cat([copies[0][start : start + n] for start, n in rows])
        return value if columns is None else torch.cat([value[:, start : start + n] for start, n in columns], dim=1)


class MegatronWeights(WeightSource):
    """Reads a checkpoint of Megatron's engine, whatever layout wrote it. Raises WeightsError when it does not fit."""

    def __init__(self, model: ModelConfig, where: Path, engine: Path) -> None:
        super().__init__(model, where)
        self._tensors = TorchDistTensors(engine)
        expected = {p.name: p.shape for p in self.layout.parameters}
        found = {name: shape for name in expected if (shape := self._tensors.shape(name)) is not None}
        refuse_unless_equal(expected, found, f"{where} does not hold the tensors of its configuration")

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(name)

    def _read(self, name: str, rows: Ranges, columns: Ranges | None) -> Tensor:
        return self._tensors.read(name, rows, *(() if columns is None else (columns,)))


# --- places ---------------------------------------------------------------------------------------------------------


def shard_file(rank: int, tp_size: int) -> str:
    """Name the file of one rank's shards, `tp_01_of_04.safetensors`."""
    return f"tp_{rank:02d}_of_{tp_size:02d}.safetensors"


def intersections(wanted: Ranges, held: Ranges) -> list[tuple[int, int, int]]:
    """List (place in the wanted ranges laid end to end, place in the held ones, length) of all that is in both."""
    found, to = [], 0
    for start, length in wanted:
        at = 0
        for first, n in held:
            low, high = max(start, first), min(start + length, first + n)
            if low < high:
                found.append((to + low - start, at + low - first, high - low))
            at += n
        to += length
    return found


def refuse_unless_equal(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raise WeightsError with every missing, unexpected and ill-shaped tensor."""
    faults = [f"  missing {n}: expected {list(s)}" for n, s in expected.items() if n not in found]
    faults += [f"  unexpected {n}: got {list(s)}" for n, s in found.items() if n not in expected]
    faults += [
        f"  {n}: expected {list(s)}, got {list(found[n])}" for n, s in expected.items() if n in found and found[n] != s
    ]
    if faults:
        more = [f"  and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
        raise WeightsError("\n".join([what + ":", *faults[:LISTED], *more]))


# --- opening --------------------------------------------------------------------------------------------------------


def open_weights(path: str | Path) -> WeightSource:
    """Open the weights of a Hugging Face directory, a converted one, a run folder or a checkpoint; reads headers only.

    A run folder stands for its newest complete checkpoint. Raises WeightsError and its parents.
    """
    path = Path(path)
    if (path / WEIGHTS_FILE).is_file():
        return _open_converted(path)
    if (path / hf_config.CONFIG_FILE).is_file():
        return HfWeights(path)
    if (path / "checkpoints").is_dir():
        newest = checkpoints.latest(path / "checkpoints")
        if newest is None:
            raise WeightsError(f"{path / 'checkpoints'}: expected a complete checkpoint, found none")
        path = newest
    if (path / checkpoints.MARKER).is_file():
        return _open_checkpoint(path)
    raise WeightsError(
        f"{path}: expected a Hugging Face model ({hf_config.CONFIG_FILE}), a converted one ({WEIGHTS_FILE}), a run "
        f"folder or a checkpoint ({checkpoints.MARKER}), found none of them"
    )


def _open_converted(path: Path) -> ShardedWeights:
    try:
        marker = json.loads((path / WEIGHTS_FILE).read_text(encoding="utf-8"))
        if marker["format"] != FORMAT:
            raise WeightsError(f"{path / WEIGHTS_FILE}: expected format {FORMAT}, got {marker['format']}")
        model = from_dict({"name": "weights", "model": marker["model"], "data": {"seq_length": 1}}).model
        tp_size = int(marker["tensor_model_parallel_size"])
    except WeightsError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path / WEIGHTS_FILE}: not what hf-to-opus writes ({error!r})") from error
    return ShardedWeights(model, path, ConvertedShards(path, tp_size), tp_size)


def _open_checkpoint(path: Path) -> WeightSource:
    config, marker = checkpoint_config(path)
    checkpoints.verify_files(path, marker)
    if config.parallel.engine == "megatron":
        return MegatronWeights(config.model, path, path / "engine")
    layout = marker["layout"]
    tp_size = layout["tensor_model_parallel_size"]
    shards = DeepSpeedShards(
        path / "engine",
        tp_size=tp_size,
        dp_size=layout["data_parallel_size"],
        dtype=DTYPES[config.training.precision],
    )
    return ShardedWeights(config.model, path, shards, tp_size)


def checkpoint_config(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Read the configuration and the marker of one complete checkpoint."""
    marker = checkpoints.read_marker(path)
    return from_dict(marker["config"]), marker
