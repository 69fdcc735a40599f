"""Run configuration: frozen keyword-only dataclasses, YAML in, precise errors out.

This page re-exports what the other rooms use; `recipe` has the dataclasses, `load` reads them from YAML.
"""

from megatron_opus.config.checks import validate_scoring
from megatron_opus.config.load import dump, from_dict, load, to_dict, validate, validate_world
from megatron_opus.config.recipe import (
    DataConfig,
    Geometry,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PreconditionerConfig,
    RedundancyConfig,
    RunConfig,
    SelectionConfig,
    SketchConfig,
    TrainingConfig,
    keeps_second_moment,
)
from megatron_opus.config.schema import ConfigError
from megatron_opus.config.strategies import AdoConfig, FilterThenWeightConfig, FloorsConfig, Strategy

__all__ = [
    "AdoConfig",
    "ConfigError",
    "DataConfig",
    "FilterThenWeightConfig",
    "FloorsConfig",
    "Geometry",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PreconditionerConfig",
    "RedundancyConfig",
    "RunConfig",
    "SelectionConfig",
    "SketchConfig",
    "Strategy",
    "TrainingConfig",
    "dump",
    "from_dict",
    "keeps_second_moment",
    "load",
    "to_dict",
    "validate",
    "validate_scoring",
    "validate_world",
]
