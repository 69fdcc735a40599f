"""The strategy seam: what a scoring pass found out, and which candidates are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_opus.types.tokens import Candidates

SignalName = Literal["loss", "ghost"]


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What the scoring pass found out about the N candidates; identical on every rank. float64, on the CPU."""

    alignment: Tensor | None = None  # [N]    <P G(z), g_V>
    halves: Tensor | None = None  # [N, 2] the alignment with each half of the proxy; for selection.controller alone
    interaction: Tensor | None = None  # [N, N] <P G(z), P G(j)>
    loss: Tensor | None = None  # [N]    mean token loss
    finite: Tensor | None = None  # [N] bool; False: the candidate gave NaN/Inf factors and must not be drawn
    expert_load: Tensor | None = None  # [N, layers, experts], float32: scored tokens sent to each; None: no experts
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
    wants_seconds: bool  # True: `observe_seconds` is called after every step that was scored

    def domain_weights(self, step: int) -> Tensor | None:
        """[D] weights for filling the buffer, or None for the configured ones."""
        ...

    def scores_at(self, step: int) -> bool:
        """Whether this step has a scoring pass; without one, `select` gets empty signals. Only asked with `needs`."""
        ...

    def picks_at(self, step: int) -> bool:
        """Whether `selection.prefilter.every_step` may pick at this step, if nothing is scored at it."""
        ...

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection: ...

    def observe(self, step: int, domain_loss: Mapping[str, float]) -> None:
        """Mean training loss of the step's sequences of each domain that was in it, unweighted; after `select`."""
        ...

    def observe_seconds(self, choosing: float, updating: float) -> None:
        """Seconds of the step's choice, scoring included, and of its update; the same on every rank."""
        ...

    def notices(self) -> list[str]:
        """Lines for the terminal since the last call."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
