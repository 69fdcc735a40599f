"""What the rooms say to each other: protocols and small records, no behaviour."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opus.config import Geometry

SignalName = Literal["loss", "ghost"]
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


# --- layers and optimizer state, as a backend describes them --------------------------------------------------------


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


# --- tokens ---------------------------------------------------------------------------------------------------------


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

    def __len__(self) -> int:
        return len(self.sample_ids)


# --- the engine seam ------------------------------------------------------------------------------------------------


class ScoringMicrobatch(Protocol):
    """One micro-batch of a scoring pass: sequences, hooks on the scored layers, and what is differentiated."""

    batch: Batch

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors at which the backward pass stops: layer outputs, after `objective` all that it depends on."""
        ...

    def observed(self) -> AbstractContextManager[object]:
        """Keep the hooks on the scored layers while the context is open."""
        ...

    def precision(self, *, backward: bool = False) -> AbstractContextManager[object]:
        """Set the precision in which the scoring forward, or its backward pass, computes."""
        ...

    def objective(self, token_losses: Tensor) -> Tensor:
        """Turn token losses [b, T] into the scalar whose activation gradients give the factors of every sequence."""
        ...


class MicrobatchRunner(Protocol):
    """Runs micro-batches through the model for a scoring pass, over as many stages as the model is cut into."""

    chunks: Sequence[torch.nn.Module]  # the pieces of the model on this rank: one, or one for each virtual stage

    def padded(self, sequences: int, size: int, windows: int = 1) -> int:
        """Return to how many sequences a share must be filled up to run in micro-batches of `size`, per window."""
        ...

    def losses(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        """Return the token losses [b, T] of every batch without a graph; None on a stage that computes no loss."""
        ...

    def backward(self, micros: Sequence[ScoringMicrobatch]) -> None:
        """Run forward and activation-gradient backward of every micro-batch. Weights are frozen by the caller."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did; identical on every rank."""

    loss: float  # mean over the K sequences
    grad_norm: float  # before clipping; inf when the step was skipped
    lr: float  # the rate that the step used
    skipped: bool  # a NaN or Inf gradient: weights, optimizer state and schedule are unchanged
    sequence_loss: Tensor | None = None  # [K] float32, each sequence's own mean, in the order the iterator was filled


class TrainEngine(Protocol):
    """The host that owns weights, gradients and optimizer state: DeepSpeed, or Megatron itself; nobody asks which."""

    groups: Groups
    device: torch.device
    description: str  # for the terminal: engine, precision and which optimizer implementation was taken

    @property
    def lr(self) -> float:
        """The learning rate of the coming step."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """The bare model: its parameters are those that the optimizer updates."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """Return a reader of the optimizer state that this rank owns."""
        ...

    def runner(self) -> MicrobatchRunner:
        """Return what runs the micro-batches of a scoring pass."""
        ...

    def train_step(self, iterator: Iterator[Batch], *, per_sequence: bool = False) -> StepResult:
        """Take this rank's micro-batches from `iterator` and update the weights once. Collective.

        `per_sequence` asks for `sequence_loss` too, K numbers once per step. Raises ValueError for a micro-batch of
        another size than `training.micro_batch_size`.
        """
        ...

    def evaluate(self, batches: Mapping[str, Batch], micro_batch_size: int) -> dict[str, float]:
        """Return the mean loss per counted token of each domain, identical on every rank. Collective.

        `batches` holds the same sequences on every rank, of which each data-parallel rank evaluates its share. A domain
        without any counted token is NaN.
        """
        ...

    def save(self, path: Path) -> None:
        """Write weights, optimizer state and schedule below `path`. Collective; a failure raises on its rank alone."""
        ...

    def rank_state(self) -> dict[str, Any] | None:
        """Return what this package keeps beside the host's state on this rank; None where it keeps nothing."""
        ...

    def load(self, path: Path, rank_state: Mapping[str, Any] | None) -> None:
        """Restore what `save` wrote and `rank_state` gave. Collective.

        Raises CheckpointError when nothing can be loaded.
        """
        ...


# --- the strategy seam ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What the scoring pass found out about the N candidates; identical on every rank. float64, on the CPU."""

    alignment: Tensor | None = None  # [N]    <P G(z), g_V>
    interaction: Tensor | None = None  # [N, N] <P G(z), P G(j)>
    loss: Tensor | None = None  # [N]    mean token loss
    finite: Tensor | None = None  # [N] bool; False: the candidate gave NaN/Inf factors and must not be drawn
    seconds: float = 0.0
    bytes_sent: int = 0
    geometry: str = ""  # which preconditioner was in force: "adamw-separable", "sgd", ...
    proxy_read: bool = True  # False: the proxy gradient of an earlier step was used again
    coverage: float | None = None  # share of the model's trainable matrix numbers that are scored; None: not counted
    left_out: tuple[str, ...] = ()  # what is not scored and why, one sentence for each reason


@dataclass(frozen=True, kw_only=True)
class Selection:
    """K of N candidates."""

    indices: Tensor  # [K] int64 positions in the buffer, in draw order
    weights: Tensor | None = None  # [K] float32 loss weights; None: all 1
    utility: Tensor | None = None  # [N] float64 at the first draw
    redundancy: Tensor | None = None  # [N] float64: at the draw for drawn ones, at the end for the others
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    fallback: str = ""  # why selection fell back to random; empty: it did not


class SelectionStrategy(Protocol):
    """How K of N candidates are chosen. Pure tensor code: the same inputs and generator give the same choice."""

    needs: frozenset[SignalName]  # what the scoring pass must produce; empty: no pass at all
    wants_domain_loss: bool  # True: `observe` is called after every step

    def domain_weights(self, step: int) -> Tensor | None:
        """[D] weights for filling the buffer, or None for the configured ones."""
        ...

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection: ...

    def observe(self, step: int, domain_loss: Mapping[str, float]) -> None:
        """Mean training loss of the step's sequences of each domain that was in it, unweighted; after `select`."""
        ...

    def notices(self) -> list[str]:
        """Lines for the terminal since the last call."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
