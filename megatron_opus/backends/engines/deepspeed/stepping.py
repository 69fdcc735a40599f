"""The engine's optimizer step: gradient norm, clipping, skipped steps and the selector's own second moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from megatron_opus.backends.engines.deepspeed.gradients import Gradients
from megatron_opus.backends.engines.deepspeed.second_moment import SecondMoment
from megatron_opus.types import Groups


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step needs beside the engine; kept on it as `engine.step_settings`."""

    groups: Groups
    gradient_clipping: float
    gradients: Gradients | None  # None: DeepSpeed takes the norm and clips
    second_moment: SecondMoment | None  # of Muon's weights, for scoring in AdamW's geometry


def take_step(engine: Any) -> tuple[float, bool]:
    """The last microbatch's `engine.step()`: gradient norm before clipping, and whether weights were updated.

    A NaN or Inf anywhere in the gradient leaves weights, optimizer state and learning rate as they are, at every
    stage. Collective.
    """
    settings: StepSettings = engine.step_settings
    gradients = settings.gradients
    if gradients is None:
        engine.step()
        norm = engine.get_global_grad_norm()
        value = float(norm) if norm is not None else math.nan
        applied = bool(engine.was_step_applied())
        return (value if applied else math.inf), applied
    total = gradients.norm(settings.groups)
    finite = bool(torch.isfinite(total))
    if finite:
        gradients.clip(total, settings.gradient_clipping)
        if settings.second_moment is not None:
            settings.second_moment.update(gradients.owned)
    elif engine.zero_optimization_stage() == 0:
        return _skip_stage_0(engine), False
    else:
        gradients.poison()
    gradients.release()
    engine.step()
    if engine.zero_optimization_stage() > 0 and bool(engine.was_step_applied()) != finite:
        raise RuntimeError(
            f"gradient norm {float(total)}: expected DeepSpeed to {'apply' if finite else 'skip'} this step, and it "
            "did not; weights and the selector's second moment no longer belong together. Please report it with the "
            "DeepSpeed version"
        )
    return (float(total) if finite else math.inf), finite


def _skip_stage_0(engine: Any) -> float:
    """Count a step without taking it, as the ZeRO stages do: no scheduler step, no optimizer step."""
    for parameter in engine.module.parameters():
        parameter.grad = None
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()
    engine.skipped_steps += 1
    return math.inf
