"""Does the scoring pass see true gradients? One candidate's are compared with autograd's, once, matrix by matrix.

The pass multiplies what its hooks see: layer inputs a and output gradients b. That is the weight's gradient only if the
layer computes x W^T and nothing else, dimension 0 is the batch, sequences do not mix, and the weight is used nowhere
else. No inspection of a model can tell that; a comparison can. For one candidate z of the first pass and every matrix

    seen    X^T (sum_t b_t a_t^T) Y    from the hooks, in z's own micro-batch, by the same projections as the sketches
    true    X^T (dL(z) / dW) Y         from autograd, of the same loss of z alone, with weights that need a gradient

with random X [rows, 8] and Y [columns, 8], functions of the matrix's name and of global rows and columns: 64 numbers a
matrix, whose relative difference is that of the gradients but for a factor near one. Neither gradient is kept. Cost:
forward and backward of one sequence with weight gradients.

Under tensor parallelism every rank compares its own shards; all ranks of a model learn of a difference on any of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.errors import Refusal
from megatron_opus.scoring.projections import Part
from megatron_opus.scoring.sums import Sums
from megatron_opus.selection.sketch import indices
from megatron_opus.types import Batch, Groups, MicrobatchRunner, Ranges, ScoredLayer, ScoringMicrobatch

PROBES = 8
# Relative difference that rounding may make. Sums in another order differ by about eps; gradients that went through
# many layers by several times that. What the comparison is for is larger than 0.05 (0.06 to 5e6 were seen).
SMALLEST_TOLERANCE = 1e-3  # float32 and better
EPSILONS = 8.0  # in units of the rounding error of the activations' dtype: 0.06 for bfloat16
# A matrix with a tiny gradient next to the largest one (zero but for cancellation) may be rounding and nothing else.
FLOOR_EPSILONS = 16.0  # in units of that rounding error times the largest gradient


class VerificationError(Refusal, RuntimeError):
    """The scoring pass does not see the gradients that autograd computes: its scores would be wrong."""


@runtime_checkable
class WeightGradients(Protocol):
    """Differentiates by whole weights with autograd, to check what the hooks of a scoring pass see."""

    @property
    def incomparable(self) -> str:
        """Why this rank cannot have the gradient of each weight for one of its sequences; empty where it can."""
        ...

    def weight_gradients(
        self, micro: ScoringMicrobatch, weights: Sequence[torch.nn.Parameter], read: Callable[[int, Tensor], None]
    ) -> None:
        """Differentiate the objective of one micro-batch by `weights`; nothing is added to any `.grad`.

        Hands the gradient of weights[i] to read(i, gradient) and keeps none; a weight that the objective does not
        depend on is left out. Collective over the tensor-parallel group. The caller has frozen all weights.
        """
        ...


def gradient_check(runner: MicrobatchRunner) -> tuple[WeightGradients | None, str]:
    """Return the runner if it can differentiate by weights; otherwise None, and the reason why nothing is compared."""
    if not isinstance(runner, WeightGradients):
        return None, f"{type(runner).__name__} cannot differentiate by weights (the model is cut into pipeline stages)"
    return (None, runner.incomparable) if runner.incomparable else (runner, "")


class Verifier:
    """Compares one candidate's gradients. `compare` is collective over the tensor- and data-parallel groups."""

    def __init__(
        self, gradients: WeightGradients, matrices: Sequence[ScoredLayer], groups: Groups, device: torch.device
    ) -> None:
        self.result = ""  # what was found; empty until the comparison was made
        self._gradients, self._matrices, self._groups, self._device = gradients, matrices, groups, device
        self._true: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        self._tolerance = 0.0
        self._wrong: list[int] = []

    def choose(self, window: Batch) -> int | None:
        """The first sequence with a counting token; None where there is none."""
        counting = (window.loss_mask != 0).any(1).nonzero().flatten()
        return int(counting[0]) if len(counting) else None

    def parts(self) -> list[Part]:
        """One part for each matrix, with which the hooks add up the chosen sequence's `seen` in `Sums.probes`."""
        return [Part(kept=y, projected=x, probe=True) for x, y in map(self._sides, self._matrices)]

    def compare(self, micro: ScoringMicrobatch, seen: Sums, *, known: bool) -> bool:
        """Tell whether any rank found a difference; `micro` is the chosen sequence alone. Collective.

        `known`: this rank has chosen a sequence. Where its numbers are not finite, nothing is decided and the next
        pass tries again: such candidates are marked by the pass itself. The caller has frozen the weights.
        """
        self._true, self._seen, self._wrong = {}, seen.probes, []
        if known:
            weights = list({id(x.weight): x.weight for x in self._matrices}.values())  # several matrices may lie in one
            self._gradients.weight_gradients(micro, weights, lambda i, gradient: self._read(weights[i], gradient))
        eps = max([seen.epsilon, *(torch.finfo(x.weight.dtype).eps for x in self._matrices)])
        if self._device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
            eps = max(eps, 2.0**-11)  # products of TF32 numbers
        self._tolerance = max(SMALLEST_TOLERANCE, EPSILONS * eps)
        counted = [i for i, x in enumerate(self._matrices) if not x.replicated or self._groups.tp_rank == 0]
        sizes, differences = [], []
        for i in counted if known else []:
            true, found = self._pair(i)
            sizes.append(true.norm())
            differences.append((found - true).norm())
        numbers = torch.stack([*sizes, *differences]).tolist() if sizes else []
        sizes_, differences_ = numbers[: len(sizes)], numbers[len(sizes) :]
        finite = all(abs(x) < float("inf") for x in numbers)
        floor = FLOOR_EPSILONS * eps * max(sizes_, default=0.0)
        if finite:
            self._wrong = [
                i
                for i, size, difference in zip(counted if known else [], sizes_, differences_, strict=True)
                if difference > self._tolerance * size + floor
            ]
        worst = max((d / s for d, s in zip(differences_, sizes_, strict=True) if s > 0), default=0.0)
        summary = torch.tensor([float(bool(self._wrong)), float(known and not finite), float(known), worst])
        summary = summary.nan_to_num(0.0, 0.0, 0.0).to(self._device)
        for group in (self._groups.tp, self._groups.cp, self._groups.dp):
            if group is not None:
                dist.all_reduce(summary, op=dist.ReduceOp.MAX, group=group)
        wrong, unusable, compared, worst = summary.tolist()
        if not wrong and not unusable and compared:
            self.result = (
                f"the gradients of {len(self._matrices)} matrices were compared with autograd's for one sequence: "
                f"largest relative difference {worst:.1e}, allowed {self._tolerance:.1e}"
            )
        return bool(wrong)

    def explained(self, alone: Sums, micro_batch: int) -> VerificationError:
        """The error with its likely cause; `alone` is what the hooks saw of the sequence by itself."""
        if not self._wrong:
            return self.difference("")
        index = self._wrong[0]
        kind = type(self._matrices[index].module).__name__
        true, seen = self._pair(index)
        by_itself = alone.probes.get(index, torch.zeros_like(true))
        scale = float((seen * true).sum() / true.square().sum().clamp(min=torch.finfo(true.dtype).tiny))
        if micro_batch > 1 and float((by_itself - true).norm()) <= self._tolerance * float(true.norm()):
            return self.difference(
                f"read alone the sequence gives the true gradient, in its micro-batch of {micro_batch} it does not: "
                "dimension 0 of the layer's activations is not the batch (time-major), or sequences mix (batch norm, "
                "attention across the batch); set selection.score_micro_batch_size=1 if each sequence is meant to be "
                "alone"
            )
        if float((seen - scale * true).norm()) <= self._tolerance * float(seen.norm()):
            return self.difference(
                f"the hooks see {scale:.4g} times the true gradient: {kind} scales its output or its weight; leave the "
                "layer out (build_scorer's `wanted`)"
            )
        return self.difference(
            f"{kind} computes something else than its input times its weight, or the weight is also used where no hook "
            "sees it (another module, a function); leave the layer out (build_scorer's `wanted`)"
        )

    def difference(self, cause: str) -> VerificationError:
        """The error for the first layer whose gradients differ on this rank."""
        if not self._wrong:
            return VerificationError(
                "another rank found that the hooks do not see its matrices' gradients; its own message names the layer"
            )
        true, seen = self._pair(self._wrong[0])
        size = float((seen - true).norm() / true.norm().clamp(min=torch.finfo(true.dtype).tiny))
        others = [self._matrices[i].name for i in self._wrong[1:4]]
        also = f" (and {len(self._wrong) - 1} more, such as {', '.join(others)})" if others else ""
        return VerificationError(
            f"layer {self._matrices[self._wrong[0]].name}{also}: expected the gradient that autograd computes for one "
            f"sequence, found one that differs by {size:.3g} of it (allowed: {self._tolerance:.1e}): {cause}"
        )

    def _read(self, weight: torch.nn.Parameter, gradient: Tensor) -> None:
        for index, layer in enumerate(self._matrices):
            if layer.weight is weight:
                x, y = self._sides(layer)
                own = gradient if layer.part is None else gradient[layer.part]
                with torch.autocast(gradient.device.type, enabled=False):
                    self._true[index] = x.mT @ own.float() @ y

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        zero = torch.zeros(PROBES, PROBES, device=self._device)
        return self._true.get(index, zero), self._seen.get(index, zero)

    def _sides(self, layer: ScoredLayer) -> tuple[Tensor, Tensor]:
        """X [rows of this rank, 8] and Y [columns of this rank, 8]: pieces of sides that all ranks agree on."""
        x = self._side(layer.name, "rows", layer.d_out, layer.rows)
        y = self._side(layer.name, "columns", layer.d_in, layer.cols)
        return x, y

    def _side(self, name: str, side: str, size: int, ranges: Ranges) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {side}".encode()))
        return torch.randn(size, PROBES, generator=generator)[indices(ranges)].to(self._device)
