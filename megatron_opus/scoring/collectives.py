"""Collectives over explicit groups. A group of None is one process: nothing is sent.

Every call is counted in `Traffic`, so that the bytes a scoring pass sends are measured where they are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass
class Traffic:
    """Payload bytes this rank handed to collectives, and their number."""

    bytes_sent: int = 0
    calls: int = 0

    def count(self, tensor: Tensor) -> None:
        self.bytes_sent += tensor.numel() * tensor.element_size()
        self.calls += 1


def all_reduce(tensor: Tensor, group: ProcessGroup | None, traffic: Traffic) -> Tensor:
    """In-place sum over the group."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
        traffic.count(tensor)
    return tensor


BUCKET_BYTES = 64 * 2**20


def all_reduce_many(tensors: Sequence[Tensor], group: ProcessGroup | None, traffic: Traffic) -> None:
    """In-place sums of float32 tensors over the group, packed into buckets of at most BUCKET_BYTES (or one tensor)."""
    if group is None:
        return
    start = 0
    while start < len(tensors):
        stop, size = start + 1, tensors[start].numel()
        while stop < len(tensors) and 4 * (size + tensors[stop].numel()) <= BUCKET_BYTES:
            size += tensors[stop].numel()
            stop += 1
        bucket = tensors[start:stop]
        packed = all_reduce(torch.cat([x.flatten() for x in bucket]), group, traffic)
        for x, part in zip(bucket, packed.split([x.numel() for x in bucket]), strict=True):
            x.copy_(part.view_as(x))
        start = stop


def all_gather(tensor: Tensor, group: ProcessGroup | None, traffic: Traffic, dim: int = 0) -> Tensor:
    """Equal-shaped tensors of all ranks joined along `dim` in rank order."""
    if group is None:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    traffic.count(tensor)
    return torch.cat(parts, dim)


def broadcast(tensor: Tensor, group: ProcessGroup | None, traffic: Traffic, source: int = 0) -> Tensor:
    """In-place copy of what rank `source` of the group has."""
    if group is not None:
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
        traffic.count(tensor)
    return tensor
