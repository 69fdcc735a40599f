"""Over which ranks a user's own loop shares its batches, read off what wraps the model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from megatron_opus.backends.engines.deepspeed.partition import data_parallel_group, is_engine
from megatron_opus.backends.model.scored_layers import is_megatron
from megatron_opus.types import Groups


def data_parallel_groups(model: nn.Module, optimizer: Any) -> Groups | None:
    """Return the groups of a model inside DistributedDataParallel, or trained by a DeepSpeed engine; None otherwise.

    Also None for a Megatron model: megatron-core knows its groups.
    """
    if is_megatron(model):
        return None
    group: ProcessGroup | None = None
    if isinstance(model, DistributedDataParallel):
        group = model.process_group
    elif is_engine(model) or is_engine(optimizer):
        group = data_parallel_group(model if is_engine(model) else optimizer)
    if group is None or dist.get_world_size(group) == 1:
        return None
    return Groups(dp=group, dp_rank=dist.get_rank(group), dp_size=dist.get_world_size(group))
