"""Learning rate: linear warm-up, then half a cosine down to `min_lr`."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_opus.config import ConfigError, OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, train_steps: int) -> Callable[[int], float]:
    """Rate of optimizer step s, from 0; positive for every s < train_steps.

    lr (s + 1) / W during warm-up (s < W), then min_lr + (lr - min_lr) (1 + cos(pi (s - W) / (D - W))) / 2 until step
    D = lr_decay_steps, min_lr afterwards. W is lr_warmup_steps, or lr_warmup_fraction of D rounded down. Raises
    ConfigError when W >= D or when steps after D would have no rate.
    """
    decay = optimizer.lr_decay_steps or train_steps
    fraction = optimizer.lr_warmup_fraction
    warmup = optimizer.lr_warmup_steps if fraction is None else int(fraction * decay)
    if not 0 <= warmup < decay:
        raise ConfigError(
            f"optimizer.lr_warmup_steps: expected at least 0 and less than the {decay} steps of the decay "
            f"(optimizer.lr_decay_steps, or training.train_steps), got {warmup}"
        )
    if decay < train_steps and optimizer.min_lr == 0.0:
        raise ConfigError(
            f"optimizer.lr_decay_steps: {decay} of {train_steps} training steps, so that the last "
            f"{train_steps - decay} would train at rate 0; raise it, or set optimizer.min_lr above 0"
        )

    def rate(step: int) -> float:
        if step < warmup:
            return optimizer.lr * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / (decay - warmup))
        return optimizer.min_lr + 0.5 * (optimizer.lr - optimizer.min_lr) * (1.0 + math.cos(math.pi * progress))

    return rate
