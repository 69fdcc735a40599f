"""Find the part of each local weight shard whose optimizer state this rank owns, and the tensor that keeps it.

DeepSpeed keeps the state of a weight under another tensor than the weight, which depends on its engine:

engine                      tensor in optimizer.state                            owned part of the flattened weight
torch / ZeRO 0 fp32         the parameter                                        all
ZeRO 0 bf16, unfused        fp32_groups[g][k], one fp32 master per parameter     all
ZeRO 0 bf16, FusedAdam      fp32_groups_flat[g], parameters one after the other  all
ZeRO 1 / 2                  single_partition_of_fp32_groups[g]                   what `p._hp_mapping` says
BF16_Optimizer (ZeRO 1)     fp32_groups_flat_partition[g]                        what `p._hp_mapping` says
ZeRO 3                      fp32_partitioned_groups_flat[sub-group]              rank * ceil(numel / ranks) onward

Example: at ZeRO 1 on two ranks, two weights of 6 and 4 numbers are one flat tensor of 10. Rank 0 owns numbers 0 to 4 of
the first weight; rank 1 owns number 5 of the first and all 4 of the second. Rank 1's tensor then has 5 numbers, and the
second weight starts at offset 1 in it.

Parameters are found by identity, never by position in the model: Muon sorts its group by shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.backends.engines.hyper import find
from megatron_opus.errors import UnsupportedOptimizer

EngineKind = Literal["whole", "flat", "zero12", "bf16", "zero3"]


@dataclass(frozen=True, kw_only=True)
class Owned:
    """Names the n elements of a flattened local weight that are owned here.

    They are elements `start` to `start + n - 1` of the weight, and lie at `offset` to `offset + n - 1` of the flat
    tensor that keeps their state.
    """

    start: int
    offset: int
    n: int


class Partition:
    """Describes where one DeepSpeed engine keeps its optimizer state.

    Raises UnsupportedOptimizer for an optimizer wrapper that is not in the table above.
    """

    def __init__(self, engine: Any) -> None:
        wrapper = engine.optimizer
        self.wrapper = wrapper
        self.optimizer: torch.optim.Optimizer = getattr(wrapper, "optimizer", wrapper)
        self.offloaded = bool(getattr(wrapper, "cpu_offload", False) or getattr(wrapper, "offload_optimizer", False))
        self.kind: EngineKind
        self.flat: Sequence[Tensor] = ()  # one for each group of `params`
        self._masters: Sequence[Sequence[Tensor]] = ()  # or one for each parameter
        if hasattr(wrapper, "fp32_partitioned_groups_flat"):
            self.kind, self.params, self.flat = "zero3", wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat
            if getattr(wrapper, "swap_optimizer", False):
                raise UnsupportedOptimizer("optimizer state on NVMe: expected it in memory; set offload_optimizer=cpu")
        elif hasattr(wrapper, "bit16_groups"):
            self.kind, self.params, self.flat = "zero12", wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups
        elif hasattr(wrapper, "bf16_groups"):
            self.kind, self.params, self.flat = "bf16", wrapper.bf16_groups, wrapper.fp32_groups_flat_partition
        elif hasattr(wrapper, "fp32_groups_flat"):
            self.kind, self.params, self.flat = "flat", wrapper.fp16_groups, wrapper.fp32_groups_flat
        elif hasattr(wrapper, "fp32_groups"):
            self.kind, self.params, self._masters = "whole", wrapper.fp16_groups, wrapper.fp32_groups
        elif isinstance(wrapper, torch.optim.Optimizer):
            self.kind, self.params = "whole", [group["params"] for group in wrapper.param_groups]
            self._masters = self.params
        else:
            raise UnsupportedOptimizer(f"DeepSpeed optimizer wrapper {type(wrapper).__name__}: layout not known")
        self.sharded_over_dp = self.kind in ("zero12", "bf16", "zero3")
        self._where = {id(p): (g, k) for g, group in enumerate(self.params) for k, p in enumerate(group)}

    def where(self, weight: Tensor) -> tuple[int, int]:
        """(group of `params`, position in it). Raises UnsupportedOptimizer for a weight that is not optimized."""
        found: tuple[int, int] = find(self._where, weight)
        return found

    def group(self, weight: Tensor) -> dict[str, Any]:
        """The optimizer's parameter group: rates and other hyper-parameters."""
        g = self.where(weight)[0]
        index = self.wrapper.sub_group_to_group_id[g] if self.kind == "zero3" else g
        return self.optimizer.param_groups[index]

    def key(self, weight: Tensor) -> Tensor:
        """The tensor under which optimizer.state keeps what belongs to this weight."""
        g, k = self.where(weight)
        return self.flat[g] if len(self.flat) else self._masters[g][k]

    def owned(self, weight: Tensor) -> Owned | None:
        """The part whose state lives here; None when other data-parallel ranks own all of it."""
        g, k = self.where(weight)
        if self.kind == "whole":
            return Owned(start=0, offset=0, n=weight.numel())
        if self.kind == "flat":
            return Owned(start=0, offset=sum(p.numel() for p in self.params[g][:k]), n=weight.numel())
        if self.kind == "zero3":
            p: Any = weight
            _, offset, size = self.wrapper.grad_position[self.wrapper.get_param_id(p)]
            start = dist.get_rank(p.ds_process_group) * size  # the last parts are padded to this size
            n = min(size, p.ds_numel - start)
            return Owned(start=start, offset=offset, n=n) if n > 0 else None
        mapping: Any = vars(weight)["_hp_mapping"]  # set by DeepSpeed on every parameter it partitions
        if mapping is None:
            return None
        high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Owned(start=low.start, offset=high.start, n=high.numel)


def local_shape(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of this rank's shard; ZeRO 3 keeps a partition of it and remembers the shape."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def is_partitioned(weight: Tensor) -> bool:
    """Tell a weight of ZeRO 3, of which each rank keeps a part."""
    return hasattr(weight, "ds_id")


def is_engine(value: Any) -> bool:
    """Tell whether `value` is a DeepSpeed engine, without importing DeepSpeed."""
    return hasattr(value, "zero_optimization_stage") and hasattr(value, "module")


def data_parallel_group(engine: Any) -> dist.ProcessGroup | None:
    """Return the group over which an engine averages gradients; None where torch.distributed does not run."""
    return engine.data_parallel_group if dist.is_initialized() else None
