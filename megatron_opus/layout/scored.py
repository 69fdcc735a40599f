"""Which matrices a run scores, and the piece of each that one rank holds."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from megatron_opus.config import RunConfig
from megatron_opus.layout.shapes import parameter_shapes
from megatron_opus.layout.sharding import (
    is_column_cut,
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many processes hold the model, and how."""

    tp: int
    dp: int
    zero_stage: Literal[0, 1, 2, 3]
    micro_batch_size: int

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks: tensor_model_parallel_size={self.tp} zero_stage={self.zero_stage} "
            f"micro_batch_size={self.micro_batch_size}"
        )


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """The recipe's own layout on `world_size` processes."""
    tp = config.parallel.tensor_model_parallel_size
    return Layout(
        tp=tp,
        dp=world_size // (tp * config.parallel.pipeline_model_parallel_size),
        zero_stage=config.parallel.zero_stage,
        micro_batch_size=config.training.micro_batch_size,
    )


def _with_positions(config: RunConfig) -> RunConfig:
    m = config.model
    rows = m.max_position_embeddings or config.data.seq_length
    return dataclasses.replace(config, model=dataclasses.replace(m, max_position_embeddings=rows))


def scored_blocks(blocks: int, which: str) -> range:
    """Numbers of the blocks that `selection.scored_layers` names."""
    kind, _, number = which.partition(":")
    k = int(number or 1)
    return {"last": range(blocks - k, blocks), "every": range(blocks)[::-1][::k]}.get(kind, range(blocks))


def scored_matrices(config: RunConfig, layout: Layout) -> list[tuple[int, int, bool]]:
    """(rows, columns, columns are cut) of this rank's part of every scored matrix."""
    s, tp = config.selection, layout.tp
    shapes = parameter_shapes(_with_positions(config).model, padded=True)
    chosen = scored_blocks(config.model.num_layers, s.scored_layers)
    found = []
    for name, (rows, columns) in ((n, x) for n, x in shapes.items() if len(x) == 2):
        block = re.search(r"\.(\d+)\.", name)
        wanted = (
            s.score_embedding and "word_embeddings" in name
            if block is None
            else ".linear_" in name and name.endswith("weight") and int(block.group(1)) in chosen
        ) or (s.score_output_layer and "output_layer" in name)
        if wanted:
            cut = is_column_cut(name)
            found.append((rows if cut else rows // tp, columns // tp if cut else columns, cut))
    return found
