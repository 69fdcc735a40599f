"""Choose the reader for an optimizer: a plain torch one, or a DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import torch

from megatron_opus.backends.engines.deepspeed.optimizer_state import DeepSpeedState
from megatron_opus.backends.engines.deepspeed.partition import is_engine
from megatron_opus.backends.engines.torch_state import TorchState
from megatron_opus.errors import UnsupportedOptimizer
from megatron_opus.types import OptimizerState

__all__ = ["DeepSpeedState", "TorchState", "UnsupportedOptimizer", "optimizer_state"]


def optimizer_state(optimizer: Any) -> OptimizerState:
    """Reader for a torch optimizer or a DeepSpeed engine. Raises UnsupportedOptimizer."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return TorchState(optimizer)
    if is_engine(optimizer):
        return DeepSpeedState(optimizer)
    raise UnsupportedOptimizer(
        f"optimizer: expected a torch.optim.Optimizer or a DeepSpeed engine, got {type(optimizer).__name__}"
    )
