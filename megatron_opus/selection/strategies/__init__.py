"""Selection strategies behind `types.SelectionStrategy`."""

from megatron_opus.config import SelectionConfig
from megatron_opus.selection.strategies.opus import OpusStrategy
from megatron_opus.selection.strategies.random import RandomStrategy
from megatron_opus.types import SelectionStrategy

__all__ = ["OpusStrategy", "RandomStrategy", "build_strategy"]


def build_strategy(config: SelectionConfig) -> SelectionStrategy:
    return OpusStrategy(config) if config.strategy == "opus" else RandomStrategy()
