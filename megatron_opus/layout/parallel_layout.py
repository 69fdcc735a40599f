"""How many processes hold a model, and what each data-parallel rank keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_opus.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Holds the degrees of parallelism, the ZeRO stage and the micro-batch size of a run."""

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


def parallel_layout(config: RunConfig, world_size: int) -> ParallelLayout:
    """Read the recipe's own layout on `world_size` processes."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    return ParallelLayout(
        tp=tp,
        dp=world_size // (tp * pp),
        zero_stage=config.parallel.zero_stage,
        micro_batch_size=config.training.micro_batch_size,
    )
