"""Selection strategies behind `types.SelectionStrategy`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_opus.config import SelectionConfig
from megatron_opus.config.strategies import check_floors, least
from megatron_opus.selection.limits import Floors
from megatron_opus.selection.strategies.ado import AdoStrategy
from megatron_opus.selection.strategies.controller import Controller
from megatron_opus.selection.strategies.domain_bandit import DomainBandit
from megatron_opus.selection.strategies.filter_then_weight import FilterThenWeightStrategy
from megatron_opus.selection.strategies.greats import GreatsStrategy
from megatron_opus.selection.strategies.opus import OpusStrategy
from megatron_opus.selection.strategies.perplexity import PerplexityStrategy
from megatron_opus.selection.strategies.random import RandomStrategy
from megatron_opus.types import SelectionStrategy

__all__ = [
    "AdoStrategy",
    "Controller",
    "DomainBandit",
    "FilterThenWeightStrategy",
    "GreatsStrategy",
    "OpusStrategy",
    "PerplexityStrategy",
    "RandomStrategy",
    "build_strategy",
    "scoring_config",
]


def build_strategy(
    config: SelectionConfig,
    domains: Sequence[str] = (),
    prior: np.ndarray | None = None,
    ceiling: np.ndarray | None = None,
    k: int | None = None,
) -> SelectionStrategy:
    """The configured strategy over these candidate domains, in the order of `Candidates.domains`.

    prior [D]: the weights that the buffer is filled by where nothing moves them; ceiling [D]: the largest share that
    each domain has sequences for; k: sequences per update, against which floors are checked. Raises ConfigError.
    """
    floors = Floors(config.floors, domains)
    if floors.active and k is not None:
        check_floors(config.floors, k, tuple(domains))
    strategy = _inner(config, floors)
    bandit = config.domain_bandit.enabled
    ado = config.strategy == "ado" or config.ado.enabled
    if (ado or bandit) and prior is None:
        raise ValueError("shares that move: expected the domains' configured weights, got none")
    owed = None
    if k is not None:  # a whole number of the buffer's sequences, and what keeps its rounding from losing one
        owed = np.array([least(config.floors.minimum.get(name, 0.0), k) * config.rho / k + 1e-9 for name in domains])
    if bandit and prior is not None:
        strategy = DomainBandit(strategy, config.domain_bandit, domains, prior, ceiling, owed)
    if config.controller.enabled:
        picks_between = config.prefilter.pool_ratio > 1 and config.prefilter.every_step
        strategy = Controller(strategy, config.controller, floors, prior if bandit else None, picks_between)
    if ado and prior is not None:
        strategy = AdoStrategy(strategy, config.ado, domains, prior, ceiling, owed)
    return strategy


def _inner(config: SelectionConfig, floors: Floors) -> SelectionStrategy:
    match config.strategy:
        case "opus":
            return OpusStrategy(config, floors)
        case "greats":
            return GreatsStrategy(config, floors)
        case "filter_then_weight":
            return FilterThenWeightStrategy(config.filter_then_weight, floors)
        case "high_ppl" | "middle_ppl" | "low_ppl":
            return PerplexityStrategy(config.strategy, floors)
        case "random" | "ado":
            return RandomStrategy(floors)


def scoring_config(config: SelectionConfig) -> SelectionConfig:
    """What the scoring pass is to run with: the recipe's settings, for GREATS in the geometry of plain SGD."""
    if config.strategy != "greats":
        return config
    return dataclasses.replace(config, preconditioner=dataclasses.replace(config.preconditioner, kind="sgd"))
