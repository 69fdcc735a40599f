"""How many processes hold a model, and what each data-parallel rank keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_opus.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Holds the engine, the degrees of parallelism, what the optimizer splits, and the micro-batch size of a run.

    Degrees whose product is the number of ranks: tensor, pipeline, context and data parallel. Experts lie on `ep` of
    the ranks of a stage. `pieces` are those of the model on each stage (1: not interleaved).
    """

    tp: int
    dp: int
    micro_batch_size: int
    zero_stage: Literal[0, 1, 2, 3]  # DeepSpeed's
    engine: Literal["deepspeed", "megatron"] = "deepspeed"
    distributed_optimizer: bool = True  # Megatron's
    pp: int = 1
    pieces: int = 1
    cp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def shards(self) -> int:
        """Ranks that hold the same parameters, no expert's: over them an optimizer's state is split."""
        return self.dp * self.cp

    @property
    def expert_shards(self) -> int:
        """Ranks that hold the same experts."""
        return self.tp * self.cp * self.dp // self.ep

    def __str__(self) -> str:
        keys: dict[str, object] = {"tensor_model_parallel_size": self.tp}
        if self.engine == "megatron":
            keys["pipeline_model_parallel_size"] = self.pp
            keys |= {"virtual_pipeline_model_parallel_size": self.pieces} if self.pieces > 1 else {}
            keys |= {"context_parallel_size": self.cp} if self.cp > 1 else {}
            keys |= {"expert_model_parallel_size": self.ep} if self.ep > 1 else {}
            keys["use_distributed_optimizer"] = str(self.distributed_optimizer).lower()
        else:
            keys["zero_stage"] = self.zero_stage
        keys["micro_batch_size"] = self.micro_batch_size
        return f"{self.ranks} ranks: " + " ".join(f"{key}={value}" for key, value in keys.items())


def parallel_layout(config: RunConfig, world_size: int) -> ParallelLayout:
    """Read the recipe's own layout on `world_size` processes."""
    p = config.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    return ParallelLayout(
        tp=tp,
        dp=world_size // (tp * pp),
        micro_batch_size=config.training.micro_batch_size,
        zero_stage=p.zero_stage,
        engine=p.engine,
        distributed_optimizer=p.use_distributed_optimizer,
        pp=pp,
        pieces=p.virtual_pipeline_model_parallel_size or 1,
        ep=p.expert_model_parallel_size,
    )
