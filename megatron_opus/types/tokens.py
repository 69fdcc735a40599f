"""Documents, sequences and candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class TokenDocuments(Protocol):
    """A memory-mapped stream of documents stored one after the other."""

    name: str  # domain
    num_tokens: int

    @property
    def document_ends(self) -> np.ndarray:
        """[documents], int64: exclusive end of each document in the token stream, ascending."""
        ...

    def tokens(self, start: int, length: int) -> np.ndarray:
        """[length], int64: tokens of the stream at `start`, crossing document boundaries."""
        ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences ready for the model, labels already shifted: labels[b, t] is the token that follows tokens[b, t]."""

    tokens: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64
    loss_mask: Tensor  # [B, L] float32, 0 where the prediction does not count
    position_ids: Tensor  # [B, L] int64
    document_ids: Tensor | None = None  # [B, L] int32; attention stays within equal ids; None: plain causal
    attention_mask: Tensor | None = None  # [B, L], 0 for padding, which no other token sees; None: no padding

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, start: int, stop: int) -> Batch:
        """Sequences start..stop-1 as a view."""
        return self.map(lambda x: x[start:stop])

    def window(self, length: int, start: int = 0) -> Batch:
        """`length` tokens from `start` of every sequence as a view; they keep their positions and documents."""
        return self.map(lambda x: x[:, start : start + length])

    def to(self, device: torch.device | str) -> Batch:
        return self.map(lambda x: x.to(device, non_blocking=True))

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        """`f` of every tensor."""
        values = {x.name: getattr(self, x.name) for x in fields(self)}
        moved: dict[str, Any] = {name: None if value is None else f(value) for name, value in values.items()}
        return Batch(**moved)

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        joined: dict[str, Any] = {}
        for x in fields(Batch):
            found = [value for b in batches if (value := getattr(b, x.name)) is not None]
            if found and len(found) != len(batches):
                raise ValueError(f"Batch.cat: expected {x.name} in all batches or in none, got both kinds")
            joined[x.name] = torch.cat(found) if found else None
        return Batch(**joined)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The buffer of one optimizer step, the same on every rank: ids travel, tokens do not."""

    step: int
    sample_ids: np.ndarray  # [N] int64, global ids: any rank can look any of them up
    domains: np.ndarray  # [N] int32, index into the buffer's domain names
    unseen: int = 0  # So many of them, the first ones, a prefilter has taken without a look. 0: nothing was picked

    def __len__(self) -> int:
        return len(self.sample_ids)
