"""Choose the engine of a recipe."""

from __future__ import annotations

from torch import nn

from megatron_opus.backends.engines.deepspeed.train_engine import DeepSpeedEngine
from megatron_opus.backends.engines.megatron.ddp import MegatronEngine
from megatron_opus.config import RunConfig
from megatron_opus.types import Groups, TrainEngine


def build_engine(model: nn.Module, config: RunConfig, groups: Groups) -> TrainEngine:
    """Build the engine that the recipe asks for around an initialised model. Collective.

    Raises ConfigError for batch sizes or a schedule that do not fit.
    """
    engine = MegatronEngine if config.parallel.engine == "megatron" else DeepSpeedEngine
    return engine(model, config, groups)
