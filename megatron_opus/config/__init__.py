"""Run configuration: frozen keyword-only dataclasses, YAML in, precise errors out.

This page re-exports what the other rooms use; `recipe` and `data` have the dataclasses, `schema` what a field
may hold, `checks` what sections ask of each other, `text` the YAML, `load` all of it together.
"""

from megatron_opus.config.checks import validate, validate_world
from megatron_opus.config.data import DataConfig
from megatron_opus.config.load import dump, from_dict, load, to_dict, without_removed
from megatron_opus.config.mixture import DomainScheduleConfig
from megatron_opus.config.recipe import (
    Geometry,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PreconditionerConfig,
    RunConfig,
    SelectionConfig,
    SketchConfig,
    TrainingConfig,
    keeps_second_moment,
)
from megatron_opus.config.schema import ConfigError
from megatron_opus.config.strategies import (
    AdoConfig,
    ControllerConfig,
    DomainBanditConfig,
    FilterThenWeightConfig,
    FloorsConfig,
    PrefilterConfig,
    RedundancyConfig,
    Strategy,
)
from megatron_opus.config.text import read_yaml

__all__ = [
    "AdoConfig",
    "ConfigError",
    "ControllerConfig",
    "DataConfig",
    "DomainBanditConfig",
    "DomainScheduleConfig",
    "FilterThenWeightConfig",
    "FloorsConfig",
    "Geometry",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PreconditionerConfig",
    "PrefilterConfig",
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
    "read_yaml",
    "to_dict",
    "validate",
    "validate_world",
    "without_removed",
]
