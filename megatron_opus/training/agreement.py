"""Ranks that do not hold the same thing are found at start, by name, instead of in a collective that never ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist


class RankMismatch(RuntimeError):
    """A rank runs another configuration, other data or another library version."""


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Collective. Raise RankMismatch on every rank, naming the ranks and the facts that differ from rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(facts))
    problems = []
    for rank, theirs in enumerate(everyone):
        for key in sorted(set(theirs) | set(everyone[0])):
            ours, other = everyone[0].get(key), theirs.get(key)
            if ours != other:
                problems.append(f"rank {rank}: {key} is {other!r}, rank 0 has {ours!r}")
    if problems:
        raise RankMismatch(
            "ranks disagree; every process must run the same code on the same files:\n  " + "\n  ".join(problems[:20])
        )
