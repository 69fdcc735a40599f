"""What a scoring pass does to a model while it runs, and takes back when it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import nn

from megatron_opus.config import ConfigError


@contextlib.contextmanager
def undisturbed(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Freeze the weights and set evaluation mode; on leaving, modes, requires_grad and RNG states are as they were.

    Raises ConfigError inside of torch.inference_mode(), where no graph can be built.
    """
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "scoring differentiates: expected to be called outside of torch.inference_mode(), which builds no graph; "
            "leave that block for the call (torch.no_grad() around it is fine)"
        )
    # Transformer Engine keeps low-precision copies of weights from the first micro-batch of a step on: a pass makes its
    # own, and the step goes on with those that it had
    firsts = [m for chunk in chunks for m in chunk.modules() if hasattr(m, "is_first_microbatch")]
    kept = [m.is_first_microbatch for m in firsts]
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    flags = [(parameter, parameter.requires_grad) for chunk in chunks for parameter in chunk.parameters()]
    devices = {p.device for p, _ in flags if p.device.type == "cuda"}
    with (
        torch.random.fork_rng(devices=[d.index for d in devices], enabled=True),
        torch.enable_grad(),
        _checkpointing_without_reentry(),
    ):
        try:
            for module in firsts:
                module.is_first_microbatch = True  # type: ignore[assignment]
            for chunk in chunks:
                chunk.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode
            for module, first in zip(firsts, kept, strict=True):
                module.is_first_microbatch = first


class _NonReentrant:
    """Stands for torch's CheckpointFunction: the same recomputation without a backward pass inside the backward pass.

    The reentrant one refuses torch.autograd.grad and returns no graph where its inputs need no gradient, which is so
    for every input when the weights are frozen.
    """

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return checkpointing.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextlib.contextmanager
def _checkpointing_without_reentry() -> Iterator[None]:
    reentrant = checkpointing.CheckpointFunction
    checkpointing.CheckpointFunction = _NonReentrant  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        checkpointing.CheckpointFunction = reentrant  # type: ignore[misc]
