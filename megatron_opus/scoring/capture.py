"""Ghost factors: what each scored layer saw (a) and the gradient of its output (b), turned into sketches on the spot.

Per tensor-parallel rank, sequence parallel off (on: the token dimension of the scattered factor is s / tp, and the
*kept* factor is gathered, which for a projecting sketch is m_in numbers per token instead of d_in):

    layer                  a              b               sketched part of G
    ColumnParallelLinear   [s, B, in]     [s, B, out/tp]  rows of this rank, all columns
    RowParallelLinear      [s, B, in/tp]  [s, B, out]     all rows, columns of this rank
    nn.Linear              [B, s, in]     [B, s, out]     everything

A forward hook projects a and puts a tensor hook on the output; the tensor hook projects b, adds the sketch to the
pass's buffers and drops both factors. Weights are frozen during the pass, so no weight gradient is computed; the
output of a layer whose input needs no gradient becomes a leaf, which is where the backward pass stops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_opus.scoring.collectives import Traffic, all_gather
from megatron_opus.scoring.preconditioners import Preconditioners
from megatron_opus.selection.precondition import Identity, LayerPreconditioner
from megatron_opus.selection.sketch import LayerSketch
from megatron_opus.types import Groups, ScoredLayer


class CaptureError(RuntimeError):
    """A scored layer did not give its factors: scores without it would be silently wrong."""


class FeatureBuffers:
    """phi [n, F] of this rank's candidates and psi [F], the sum over its proxy sequences. float32.

    F is the sum of the layers' sketch dimensions (scope `layer`) or their maximum (scope `model`: all layers share one
    sketch, with independent hashes).
    """

    def __init__(self, dims: Sequence[int], n: int, scope: str, device: torch.device) -> None:
        self.offsets = [sum(dims[:i]) if scope == "layer" else 0 for i in range(len(dims))]
        self.dims = list(dims)
        total = sum(dims) if scope == "layer" else max(dims)
        self.phi = torch.zeros(n, total, dtype=torch.float32, device=device)
        self.psi = torch.zeros(total, dtype=torch.float32, device=device)

    def add(self, layer: int, first: int, phi: Tensor | None, psi: Tensor | None, weight: float) -> None:
        """Add one layer's part for candidates first ... first + len(phi) - 1, and for the proxy."""
        columns = slice(self.offsets[layer], self.offsets[layer] + self.dims[layer])
        if phi is not None:
            self.phi[first : first + len(phi), columns].add_(phi, alpha=weight)
        if psi is not None:
            self.psi[columns].add_(psi, alpha=weight)


class Capture:
    """Context manager: hooks on the scored layers for one micro-batch of `n_candidates` then `n_proxy` sequences."""

    def __init__(
        self,
        layers: Sequence[ScoredLayer],
        sketches: Sequence[LayerSketch],
        preconditioner: Preconditioners,
        buffers: FeatureBuffers,
        *,
        first: int,
        n_candidates: int,
        layer_weights: Sequence[float],
        groups: Groups,
        traffic: Traffic,
    ) -> None:
        self.leaves: list[Tensor] = []
        self._layers = layers
        self._sketches = sketches
        self._preconditioner = preconditioner
        self._buffers = buffers
        self._first = first
        self._n = n_candidates
        self._layer_weights = layer_weights
        self._groups = groups
        self._traffic = traffic
        self._forward_calls = [0] * len(layers)
        self._backward_calls = [0] * len(layers)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Capture:
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.module.register_forward_hook(self._make_forward_hook(index), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.leaves.clear()

    def check(self) -> None:
        """Raise CaptureError unless every layer was seen forward and backward equally often, at least once."""
        for layer, forward, backward in zip(self._layers, self._forward_calls, self._backward_calls, strict=True):
            if forward == 0 or forward != backward:
                raise CaptureError(
                    f"layer {layer.name}: expected its input and its output gradient, got {forward} forward and "
                    f"{backward} backward calls; compiled modules bypass hooks (score the uncompiled model), and a "
                    "layer that does not influence the loss cannot be scored (leave it out of the scored layers)"
                )

    def _make_forward_hook(self, index: int) -> Callable[..., Any]:
        layer, sketch = self._layers[index], self._sketches[index]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None  # the first, gradient-free half of activation checkpointing: it runs again in backward
            out = output[0] if isinstance(output, tuple) else output
            a = args[0] if args else next(iter(kwargs.values()))
            needs_leaf = not out.requires_grad
            if needs_leaf:
                leaf = out.detach().requires_grad_()
                self.leaves.append(leaf)
                out = leaf.clone()  # an in-place activation may follow, which a leaf does not allow
            self._forward_calls[index] += 1
            counted_here = not layer.replicated or self._groups.tp_rank == 0
            kept: list[Tensor | None] = []
            if counted_here:
                with torch.no_grad():
                    a_BTI = _batch_first(a.detach(), layer)
                    kept.append(self._keep(sketch, layer, a_BTI[: self._n], index) if self._n else None)
                    kept.append(self._keep(sketch, layer, a_BTI[self._n :], None) if self._n < len(a_BTI) else None)
            out.register_hook(self._make_gradient_hook(index, kept))
            if needs_leaf:
                return (out, *output[1:]) if isinstance(output, tuple) else out
            return None

        return hook

    def _keep(self, sketch: LayerSketch, layer: ScoredLayer, a_BTI: Tensor, index: int | None) -> Tensor:
        kept = sketch.keep(a_BTI, Identity() if index is None else self._preconditioner.factors(index))
        return all_gather(kept, self._groups.tp, self._traffic, dim=1) if layer.input_scattered else kept

    def _make_gradient_hook(self, index: int, factors: list[Tensor | None]) -> Callable[[Tensor], None]:
        """`factors`: what was kept of a for candidates and proxy; empty on ranks that do not count this layer."""
        layer, sketch = self._layers[index], self._sketches[index]

        def hook(grad: Tensor) -> None:
            self._backward_calls[index] += 1
            if not factors:
                return
            with torch.no_grad():
                # autograd keeps this hook until the whole graph is gone: what it closes over must not keep the factors
                kept_psi, kept_phi = factors.pop(), factors.pop()
                b_BTO = _batch_first(grad, layer)
                phi = psi = None
                if kept_phi is not None:
                    precondition = self._preconditioner(index)
                    phi = self._features(sketch, layer, kept_phi, b_BTO[: self._n], precondition)
                if kept_psi is not None:
                    # the proxy gradient is a sum over sequences: one long sequence of all their tokens
                    kept = kept_psi.reshape(1, -1, kept_psi.shape[-1])
                    psi = self._features(sketch, layer, kept, b_BTO[self._n :], Identity())[0]
                self._buffers.add(index, self._first, phi, psi, self._layer_weights[index] ** 0.5)

        return hook

    def _features(
        self, sketch: LayerSketch, layer: ScoredLayer, kept: Tensor, b_BTO: Tensor, precondition: LayerPreconditioner
    ) -> Tensor:
        projected = sketch.project(b_BTO, precondition)
        if layer.output_scattered:
            projected = all_gather(projected, self._groups.tp, self._traffic, dim=1)
        return sketch.features(kept, projected.reshape(kept.shape[0], -1, projected.shape[-1]), precondition)


def _batch_first(x: Tensor, layer: ScoredLayer) -> Tensor:
    """[B, T, d] view."""
    if x.dim() != 3:
        raise CaptureError(
            f"layer {layer.name}: expected activations [batch, tokens, features], got shape {list(x.shape)}"
        )
    return x.transpose(0, 1) if layer.sequence_first else x
