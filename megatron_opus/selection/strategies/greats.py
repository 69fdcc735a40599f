"""GREATS: greedy selection in SGD's geometry, each pick lowering the value of what resembles it.

    U_z = <lr g_z, g_V> - lambda <lr g_z, sum_{j picked} lr g_j>,   the next pick is the largest U

As published, lambda is 1 (`selection.redundancy.scale: paper`); with a small learning rate that leaves the second term
at a fraction of a percent of the first, so `matched` and `off` hold here as they do for OPUS. The scoring pass runs
with the preconditioner of plain SGD, whatever optimizer trains the model.
"""

from __future__ import annotations

import dataclasses

from megatron_opus.config import SelectionConfig
from megatron_opus.selection.limits import Floors
from megatron_opus.selection.strategies.opus import OpusStrategy


class GreatsStrategy(OpusStrategy):
    """OPUS's utility without its preconditioner and without its noise."""

    def __init__(self, config: SelectionConfig, floors: Floors | None = None) -> None:
        super().__init__(dataclasses.replace(config, sampling="greedy"), floors)
