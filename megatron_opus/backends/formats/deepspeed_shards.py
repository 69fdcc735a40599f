"""The weights inside a DeepSpeed checkpoint, read parameter by parameter without DeepSpeed running.

ZeRO 0-2   mp_rank_RR_model_states.pt: the local shards of tensor-parallel rank RR, in the precision of training
ZeRO 3     [bf16_]zero_pp_rank_D_mp_rank_RR_optim_states.pt: for each data-parallel rank D, its part of every local
           shard, one after the other in the order of `param_shapes`, float32. A shard of n numbers is cut into parts
           of ceil(n / data-parallel size), the last one padded.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opus.backends.formats.torch_files import load_plain
from megatron_opus.config import ConfigError

_HELD = 64 * 2**20  # bytes read through one mapping before it is given back: its pages count as the process's memory


class DeepSpeedShards:
    """Local shards of every tensor-parallel rank of one `engine/` directory."""

    def __init__(self, directory: Path, *, tp_size: int, dp_size: int, dtype: torch.dtype) -> None:
        """`dtype`: of the weights in training. Raises ConfigError when the files of a rank are not there."""
        self._directory, self._dp, self._dtype = directory, dp_size, dtype
        self._partitioned = not self._model_file(0).is_file()
        if self._partitioned and not self._partition(0, 0, "model").is_file():
            raise ConfigError(
                f"{directory}: expected {self._model_file(0).name} or {self._partition(0, 0, 'model').name}, "
                "found neither; is it a checkpoint of this program?"
            )
        self._open: dict[Path, Any] = {}
        self._read = 0
        self._shapes = [self._scan(rank) for rank in range(tp_size)]
        self._offsets: list[dict[str, int]] = []
        for shapes in self._shapes:
            offsets, at = {}, 0
            for name, shape in shapes.items():
                offsets[name] = at
                at += self._part(shape)
            self._offsets.append(offsets)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Parameter -> local shape on tensor-parallel rank `rank`."""
        return self._shapes[rank]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, rank: int, name: str, *ranges: tuple[int, int]) -> Tensor:
        """A copy of the (start, length) ranges of the first dimensions of one local shard, the others whole."""
        if self._read > _HELD:
            self.close()
        whole = self._gathered(rank, name) if self._partitioned else self._load(self._model_file(rank))["module"][name]
        piece = whole[tuple(slice(start, start + length) for start, length in ranges)].to(self._dtype, copy=True)
        self._read += (whole if self._partitioned else piece).numel() * whole.element_size()
        return piece

    def close(self) -> None:
        """Give back what is mapped; reading opens again."""
        self._open, self._read = {}, 0

    def _scan(self, rank: int) -> dict[str, tuple[int, ...]]:
        if self._partitioned:
            path = self._partition(rank, 0, "model")
            groups = self._load(path)["param_shapes"]
            return {name: tuple(shape) for group in groups for name, shape in group.items()}
        module = self._load(self._model_file(rank))["module"]
        return {name: tuple(value.shape) for name, value in module.items() if isinstance(value, Tensor)}

    def _gathered(self, rank: int, name: str) -> Tensor:
        shape = self._shapes[rank][name]
        parts = []
        for dp in range(self._dp):
            state = self._load(self._partition(rank, dp, "optim"))["optimizer_state_dict"]
            parts.append(_narrow(state["fp32_flat_groups"], self._offsets[rank][name], self._part(shape)))
        return torch.cat(parts)[: math.prod(shape)].view(shape)

    def _part(self, shape: tuple[int, ...]) -> int:
        return -(-math.prod(shape) // self._dp)

    def _load(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = load_plain(path, mmap=True)
        return self._open[path]

    def _model_file(self, rank: int) -> Path:
        return self._directory / f"mp_rank_{rank:02d}_model_states.pt"

    def _partition(self, rank: int, dp: int, kind: str) -> Path:
        path = self._directory / f"zero_pp_rank_{dp}_mp_rank_{rank:02d}_{kind}_states.pt"
        bf16 = path.with_name(f"bf16_{path.name}")  # what the optimizer's files are called in bf16
        return bf16 if bf16.is_file() else path


def _narrow(groups: list[Tensor], start: int, length: int) -> Tensor:
    """Numbers start ... start + length - 1 of the groups taken as one vector."""
    pieces = []
    for group in groups:
        if start < group.numel() and length > 0:
            taken = min(length, group.numel() - start)
            pieces.append(group.narrow(0, start, taken))
            start, length = 0, length - taken
        else:
            start -= group.numel()
    return torch.cat(pieces)
