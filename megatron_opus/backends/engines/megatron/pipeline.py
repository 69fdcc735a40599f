"""Megatron's own schedules (none, 1F1B, interleaved), for training and for scoring passes over pipeline stages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_opus.backends.model import cpu_shims
from megatron_opus.backends.model.gpt import forward_piece
from megatron_opus.types import Batch, ScoringMicrobatch

# What a training step hangs on the schedule, and a scoring pass must not set off: the reduction of gradients, its
# start, its suppression between micro-batches, the gathering of weights, the loss scale, clocks.
TRAINING_ONLY = (
    *("finalize_model_grads_func", "grad_sync_func", "no_sync_func", "param_sync_func", "grad_scale_func", "timers"),
)
# of one piece of the model and one micro-batch: (output, what turns the last stage's output into a loss)
Forward = Callable[[Any, int], tuple[Tensor, Callable[[Tensor], Tensor]]]


def run_schedule(
    pieces: Sequence[nn.Module], count: int, forward: Forward, *, size: int, length: int, forward_only: bool = False
) -> None:
    """Run `count` micro-batches of [size, length] tokens forward and backward on this stage. Collective.

    `pieces` are this stage's parts of the model, bare or wrapped; `forward(piece, i)` runs micro-batch i. The gradient
    of a step is the mean over its micro-batches: Megatron divides each loss by their number. With context parallelism
    `length` are this rank's tokens; Megatron is told those of all, and takes a loss to be a mean over this rank's.
    """
    contexts = parallel_state.get_context_parallel_world_size()
    taken = {id(piece): 0 for piece in pieces}  # each piece walks through the same micro-batches in order

    def step(_: Any, piece: Any, checkpoint_activations: bool | None = None) -> tuple[Tensor, Any]:
        index = taken[id(piece)]
        taken[id(piece)] += 1
        with cpu_shims.plain():
            output, loss = forward(piece, index)
        return output, lambda found: (loss(found) / contexts, {})

    with cpu_shims.cuda_names():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(pieces),
            model=list(pieces),
            num_microbatches=count,
            seq_length=length * contexts,
            micro_batch_size=size,
            forward_only=forward_only,
        )


@contextlib.contextmanager
def without_training(config: Any) -> Iterator[None]:
    """Take from Megatron's configuration what belongs to a training step, for as long as the block runs."""
    kept = {name: getattr(config, name) for name in TRAINING_ONLY}
    try:
        for name in kept:
            setattr(config, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


class ScheduleRunner:
    """Runs scoring micro-batches through a model that is cut into pipeline stages (see `MicrobatchRunner`)."""

    def __init__(
        self,
        pieces: Sequence[Any],
        device: torch.device,
        quiet: Callable[[], AbstractContextManager[None]],
        forward: Callable[[Any, Batch], Tensor] = forward_piece,
    ) -> None:
        """`pieces` are the bare parts of this stage. `quiet()` keeps the wrappers' own hooks away while they run.

        `forward(piece, batch)` gives what a piece sends on, or, of the last one, the unreduced losses [b, T].
        """
        self.chunks: Sequence[nn.Module] = pieces
        self._device, self._quiet, self._forward = device, quiet, forward
        self._config = pieces[0].config
        virtual = len(pieces)
        self._multiple = parallel_state.get_pipeline_model_parallel_world_size() if virtual > 1 else 1

    def padded(self, sequences: int, size: int, windows: int = 1) -> int:
        """Fill a share up: stages exchange tensors of one shape, and virtual stages want a multiple of their number.

        Example: 7 sequences in micro-batches of 4 become 8; over 4 interleaved stages, 16.
        """
        micros = -(-sequences // size)
        step = self._multiple // math.gcd(self._multiple, windows)
        return size * step * -(-micros // step)

    def losses(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        if not batches:
            return [] if self._computes_losses else None
        size, count = max(len(batch) for batch in batches), len(batches)
        found: dict[int, Tensor] = {}

        def forward(piece: Any, index: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            batch = batches[min(index, count - 1)]

            def keep(token_losses: Tensor) -> Tensor:
                found[index] = token_losses[: len(batch)].float()
                return torch.zeros((), device=self._device)

            filled_up = Batch.cat([batch, *[batch.rows(0, 1)] * (size - len(batch))])
            return self._forward(piece, filled_up.to(self._device)), keep

        length = batches[0].tokens.shape[1]
        filled = self.padded(count, 1)
        with torch.no_grad(), self._quiet(), without_training(self._config):
            run_schedule(self.chunks, filled, forward, size=size, length=length, forward_only=True)
        return [found[i] for i in range(count)] if self._computes_losses else None

    def backward(self, micros: Sequence[ScoringMicrobatch]) -> None:
        size, length = micros[0].batch.tokens.shape

        def forward(piece: Any, index: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            micro = micros[index]
            # module hooks see this forward pass alone, others are in flight; those on tensors wait for the backward
            with micro.observed(), micro.precision():
                output = self._forward(piece, micro.batch.to(self._device))

            def loss(token_losses: Tensor) -> Tensor:
                with torch.autocast(self._device.type, enabled=False):
                    return micro.objective(token_losses.float()) * len(micros)

            return output.to(self._config.pipeline_dtype) if not piece.post_process else output, loss

        with self._quiet(), without_training(self._config), micros[0].precision(backward=True):
            run_schedule(self.chunks, len(micros), forward, size=size, length=length)

    @property
    def _computes_losses(self) -> bool:
        last: Any = self.chunks[-1]
        return bool(last.post_process)
