"""What engines share: the runner of a model that is whole on every rank, and evaluation."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_opus.backends.engines.deepspeed.partition import is_partitioned
from megatron_opus.config import ConfigError, RunConfig
from megatron_opus.types import Batch, Groups, MicrobatchRunner, ScoringMicrobatch


class WholeModelRunner:
    """Runs scoring micro-batches through a model that is not cut into pipeline stages (see `MicrobatchRunner`)."""

    def __init__(
        self, model: nn.Module, token_losses: Callable[[nn.Module, Batch], Tensor], device: torch.device
    ) -> None:
        """`token_losses(model, batch)` gives the unreduced float32 losses [b, T]; `device` is where batches go."""
        self.chunks: Sequence[nn.Module] = (model,)
        self._model, self._token_losses, self._device = model, token_losses, device

    @property
    def incomparable(self) -> str:
        # ZeRO 3 gathers a weight while its module runs, and replaces it before autograd could keep a gradient of it
        if any(is_partitioned(p) for p in self._model.parameters()):
            return "ZeRO 3 keeps no whole one"
        if any(not getattr(p, "allreduce", True) for p in self._model.parameters()):  # as Megatron marks experts
            return "experts on other ranks add up the gradients of several ranks' sequences"
        return ""

    def padded(self, sequences: int, size: int, windows: int = 1) -> int:
        return sequences

    def losses(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        with torch.no_grad():
            return [self._token_losses(self._model, batch.to(self._device)) for batch in batches]

    def backward(self, micros: Sequence[ScoringMicrobatch]) -> None:
        for micro in micros:
            self._one(micro)

    def _one(self, micro: ScoringMicrobatch) -> None:
        """Run one micro-batch in a scope of its own, so that its graph is gone before the next one is built."""
        # the hooks stay through the backward pass, in which activation checkpointing runs the forward pass again
        with micro.observed():
            with micro.precision():
                token_losses = self._token_losses(self._model, micro.batch.to(self._device))
            objective = micro.objective(token_losses)
            with micro.precision(backward=True):
                torch.autograd.grad(objective, micro.leaves)

    def weight_gradients(
        self, micro: ScoringMicrobatch, weights: Sequence[nn.Parameter], read: Callable[[int, Tensor], None]
    ) -> None:
        # Megatron's fused kernel would add the gradient to main_grad and give autograd an empty one
        names = ("gradient_accumulation_fusion", "fuse_wgrad_accumulation")  # Megatron's, Transformer Engine's
        fused = [(m, name) for m in self._model.modules() for name in names if getattr(m, name, False)]

        def hook(index: int, gradient: Tensor) -> Tensor:
            # autograd keeps what a hook returns: nothing, here
            if gradient.is_sparse:  # nn.Embedding(sparse=True)
                read(index, gradient.to_dense())
                return torch.zeros_like(gradient)
            read(index, gradient)
            return gradient.new_zeros(()).expand_as(gradient)

        for module, name in fused:
            setattr(module, name, False)
        handles = []
        try:
            for index, weight in enumerate(weights):
                weight.requires_grad_(True)
                handles.append(weight.register_hook(functools.partial(hook, index)))
            with micro.precision():
                token_losses = self._token_losses(self._model, micro.batch.to(self._device))
            objective = micro.objective(token_losses)
            with micro.precision(backward=True):
                torch.autograd.grad(objective, weights, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
            for module, name in fused:
                setattr(module, name, True)


def accumulation_steps(config: RunConfig, dp_size: int) -> int:
    """Return the micro-batches of one data-parallel rank in one optimizer step.

    Raises ConfigError unless K = micro_batch_size x accumulation steps x data-parallel size.
    """
    t = config.training
    steps, rest = divmod(t.global_batch_size, t.micro_batch_size * dp_size)
    if rest or not steps:
        raise ConfigError(
            f"training.global_batch_size: expected a multiple of micro_batch_size x data-parallel size "
            f"({t.micro_batch_size} x {dp_size}), got {t.global_batch_size}"
        )
    return steps


def evaluate(
    runner: MicrobatchRunner,
    batches: Mapping[str, Batch],
    groups: Groups,
    micro_batch_size: int,
    device: torch.device,
    *,
    equally_often: bool,
) -> dict[str, float]:
    """Compute the mean loss per counted token of each domain, identical on every rank. Collective.

    `batches` holds the same sequences on every rank, of which each data-parallel rank evaluates its share. Dropout is
    off and the model's mode is restored. `equally_often` makes every rank run as many forward passes as the others:
    ZeRO 3 gathers weights in each of them, and experts on other ranks
    wait for tokens. A domain without any counted token is NaN.
    """
    sums = torch.zeros(len(batches), 2, dtype=torch.float64, device=device)  # loss, tokens
    with evaluation(runner.chunks):
        for row, batch in enumerate(batches.values()):
            first, last = (len(batch) * (groups.dp_rank + i) // groups.dp_size for i in (0, 1))
            largest = -(-len(batch) // groups.dp_size)
            starts = range(first, first + largest, micro_batch_size)
            pieces = [batch.rows(start, min(start + micro_batch_size, last)) for start in starts if start < last]
            idle = [batch.rows(0, 1)] * (len(starts) - len(pieces)) if equally_often else []
            given = [*pieces, *idle]
            if groups.ep is not None:  # experts take equally many tokens from every rank
                size = min(micro_batch_size, largest)
                given = [Batch.cat([x, *[x.rows(0, 1)] * (size - len(x))]) for x in given]
            found = runner.losses(given) or ()
            for piece, losses in zip(pieces, found, strict=False):  # the idle ones do not count
                counted = piece.loss_mask.to(device) != 0
                sums[row, 0] += losses[: len(piece)][counted].double().sum()
                sums[row, 1] += counted.sum()
    for group in (groups.pp, groups.dp):  # of the stages, the last one alone has counted
        if group is not None:
            dist.all_reduce(sums, group=group)
    values = sums.tolist()
    return {name: (loss / n if n else math.nan) for name, (loss, n) in zip(batches, values, strict=True)}


@contextlib.contextmanager
def evaluation(models: Sequence[nn.Module]) -> Iterator[None]:
    """Turn dropout and graphs off inside the block; the modes that were there come back after it."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def of_all_ranks(own: Tensor, groups: Groups) -> Tensor:
    """Gather [K / dp] values to [K], identical to the last bit on every rank. Collective."""
    if groups.dp is not None:
        parts = [torch.empty_like(own) for _ in range(groups.dp_size)]
        dist.all_gather(parts, own, group=groups.dp)
        own = torch.cat(parts)
    if groups.tp is not None:  # what is decided from it must not depend on a rank's kernels
        dist.broadcast(own, src=dist.get_global_rank(groups.tp, 0), group=groups.tp)
    return own
