"""Process groups, layers and optimizer state, as a backend describes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opus.config import Geometry

Ranges = tuple[tuple[int, int], ...]  # (global start, length) pieces, in the order in which a shard stores them


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Holds the process groups of one rank: tensor, data, pipeline, context and expert parallel.

    A group of one process is None: no communication. `state` is the group over which the optimizer state of a weight is
    spread, at every ZeRO stage: the data-parallel one unless `state_size` is given. With context parallelism it is the
    data x context group. `expert_state` is that of experts which lie on different ranks.

    `tokens` holds the ranks among which the tokens of this rank's sequences lie: the tensor-parallel group unless
    `shares` is given, with context parallelism the tensor x context group. Expert parallelism sends tokens to ranks of
    other data-parallel shares: then the group holds the tokens of `shares` such shares, and this rank's is `share`.
    """

    tp: ProcessGroup | None = None
    dp: ProcessGroup | None = None
    pp: ProcessGroup | None = None
    cp: ProcessGroup | None = None
    ep: ProcessGroup | None = None
    state: ProcessGroup | None = None
    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    state_rank: int = 0
    state_size: int = 0  # 0: as data parallelism
    expert_state: ProcessGroup | None = None
    expert_state_rank: int = 0
    tokens: ProcessGroup | None = None
    share: int = 0
    shares: int = 0  # 0: `tokens` is the tensor-parallel group

    def __post_init__(self) -> None:
        if self.state_size == 0:
            for name in ("", "_rank", "_size"):
                object.__setattr__(self, f"state{name}", getattr(self, f"dp{name}"))
        if self.shares == 0:
            object.__setattr__(self, "tokens", self.tp)
            object.__setattr__(self, "shares", 1)

    def state_of(self, layer: ScoredLayer) -> tuple[ProcessGroup | None, int]:
        """Return the group over which the optimizer state of a layer's weight is spread, and this rank's place in it.

        The gradients of the weight are added up over the same ranks.
        """
        if layer.apart:
            return self.expert_state, self.expert_state_rank
        return self.state, self.state_rank


class Routing(Protocol):
    """Follows the tokens of a micro-batch to the experts of one layer."""

    def observed(self, sequences: int, share: int) -> AbstractContextManager[object]:
        """Follow the tokens of forward passes of `sequences` sequences while the context is open.

        `share` is this rank's place among the data-parallel shares whose tokens these experts see (see `Groups`).
        """
        ...

    def sequences(self, expert: int) -> Tensor:
        """Return [rows] int64: the sequence that each row belongs to which this rank's expert number `expert` gets.

        Sequence i of share s is s * sequences + i. With 2 sequences on each of 2 ranks, 0 and 1 are those of the first
        rank and 2 and 3 those of the second.
        """
        ...

    def load(self) -> Tensor:
        """Return [sequences, experts] float32: the tokens of each sequence that this rank sent to each expert."""
        ...


@dataclass(frozen=True, kw_only=True)
class ScoredLayer:
    """One use of a matrix whose weight gradient enters the score: a linear layer y = x W^T, or an embedding y = W[ids].

    `rows` and `cols` say which part of the whole [d_out, d_in] matrix this rank holds; hashes and preconditioners are
    taken on those global coordinates, so that partial results of the shards add up to the unsharded ones. Layers with
    equal names are uses of one matrix (a tied embedding and output layer): their gradients add up.
    """

    name: str  # of the matrix; the same on every rank and for every sharding
    module: torch.nn.Module
    weight: torch.nn.Parameter
    d_out: int  # of the whole matrix; an embedding's vocabulary
    d_in: int
    rows: Ranges
    cols: Ranges
    sequence_first: bool  # activations are [s, b, d] (Megatron) rather than [b, s, d]
    embedding: bool = False
    cut: Literal["rows", "cols"] = "rows"  # the side that tensor parallelism cuts, at every degree, 1 included
    replicated: bool = False  # every tensor-parallel rank holds the whole matrix: count it once
    transposed: bool = False  # the layer is y = x W: the rows of W are its inputs
    input_scattered: bool = False  # sequence parallel: each rank holds its slice of the tokens of a
    output_scattered: bool = False  # likewise of b
    part: int | None = None  # the matrix is weight[part], of a weight of three dimensions; None: it is the weight
    input_of: Callable[[Tensor], Tensor] | None = None  # makes a of what the module is given; None: it is a
    own_tokens: bool = False  # each tensor-parallel rank holds the whole matrix and reads its own tokens alone
    routing: Routing | None = None  # of an expert: activations are [rows, d], of tokens that were sent to it
    expert: int = 0  # its number among the experts of this rank
    apart: bool = False  # an expert that lies on the ranks of `Groups.expert_state` alone
    slot: str = ""  # layers of one slot share one sketch, with independent hashes; empty: a slot of its own
    shown: Callable[[], AbstractContextManager[object]] | None = None  # inside it, the model calls `module`


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The part of a flattened local weight shard whose optimizer state lives on this rank."""

    start: int  # in the flattened local shard
    values: Tensor  # [n], any float dtype

    def within(self, first: int, size: int) -> Fragment | None:
        """Return what lies in elements first ... first + size - 1, counted from there; None where nothing does."""
        start, stop = max(self.start, first), min(self.start + self.values.numel(), first + size)
        if start >= stop:
            return None
        return Fragment(start=start - first, values=self.values[start - self.start : stop - self.start])


@dataclass(frozen=True, kw_only=True)
class AdamHyper:
    """Hyper-parameters of the **coming** AdamW step of one parameter's group, and the steps already completed."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int  # completed optimizer steps (the t of method Eq. 8-13); 0: no state yet


@dataclass(frozen=True, kw_only=True)
class MuonHyper:
    """The **coming** Muon step of one matrix: W <- W - lr * scale * NewtonSchulz(q), q the (Nesterov) momentum.

    Each Newton-Schulz step (a, b, c) is X <- a X + b (X X^T) X + c (X X^T)^2 X on the smaller side of the matrix,
    started from q / ||q||_F. All of it is read from the optimizer in use.

    Under tensor parallelism either each shard is such a matrix, or (`whole`) the shards of all ranks together are. With
    `split` the rows of a matrix (of a shard, where it is not `whole`) are groups of so many rows of each part, and each
    part is orthogonalised apart with a scale of its own; `scale` is 1 then. Example: 4 query groups with
    `split` ((16, 2.0), (8, 1.5), (8, 1.5)) are 128 rows: the first part has rows 0 to 15, 32 to 47, ... with scale 2.
    """

    lr: float
    momentum: float  # mu of m <- mu m + (1 - mu) g
    nesterov: bool
    scale: float  # of this matrix: the optimizer's factor for its shape
    coefficients: tuple[tuple[float, float, float], ...]  # one (a, b, c) for each Newton-Schulz step
    step: int  # completed optimizer steps; 0: no momentum yet
    whole: bool = False
    split: tuple[tuple[int, float], ...] = ()  # (rows in each group, scale) of each part


@dataclass(frozen=True, kw_only=True)
class SgdHyper:
    """The **coming** step of plain SGD: W <- W - lr g."""

    lr: float


Hyper = AdamHyper | MuonHyper | SgdHyper


class OptimizerState(Protocol):
    """Reads, without communication, the optimizer state that this rank owns."""

    sharded_over_dp: bool  # False: every data-parallel rank holds all of it

    def hypers(self, weights: Sequence[torch.nn.Parameter], geometry: Geometry = "auto") -> list[Hyper]:
        """One for each weight, with at most one device synchronisation for all of them.

        `auto` is each weight's own optimizer (a Muon run has AdamW weights too); another geometry gives the
        hyper-parameters under which that weight is scored instead. Raises UnsupportedOptimizer where the state for it
        does not exist.
        """
        ...

    def second_moment(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        """Owned fragments of exp_avg_sq; empty where this rank owns nothing of `weight`. Disjoint over ranks."""
        ...

    def momentum(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        """Muon's momentum held here; empty where there is none. Ranks may hold overlapping (equal) fragments."""
        ...
