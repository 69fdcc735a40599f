"""Which layers are scored, and which part of each matrix this rank holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from megatron_opus.types import Groups, Ranges, ScoredLayer

# name -> (whole shape (d_out, d_in), rows of this rank, columns of this rank)
ShardMap = Callable[[str], tuple[tuple[int, int], Ranges, Ranges]]

OUTPUT_LAYERS = ("output_layer", "lm_head", "embed_out")


def megatron_layers(model: nn.Module, shard_map: ShardMap, *, include_output_layer: bool = False) -> list[ScoredLayer]:
    """Column- and RowParallelLinear layers with trainable weights, in module order.

    A weight without `requires_grad` is not part of the coming update and is left out. Tied output layers have no
    weight of their own and are never listed here. Raises ValueError when a weight does not have the shape that
    `shard_map` gives it: the sketches of such a shard would not add up.
    """
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear) or module.weight is None:
            continue
        if not module.weight.requires_grad or (_is_output(name) and not include_output_layer):
            continue
        column = isinstance(module, ColumnParallelLinear)
        whole, rows, cols = shard_map(f"{name}.weight")
        local = (sum(n for _, n in rows), sum(n for _, n in cols))
        found = tuple(getattr(module.weight, "ds_shape", module.weight.shape))  # ZeRO 3 leaves nothing in the weight
        if found != local:
            raise ValueError(f"{name}.weight: expected the local shape {local}, got {found}")
        layers.append(
            ScoredLayer(
                name=name,
                module=module,
                weight=module.weight,
                d_out=whole[0],
                d_in=whole[1],
                rows=rows,
                cols=cols,
                sequence_first=True,
                input_scattered=column and module.sequence_parallel,
                output_scattered=not column and module.sequence_parallel,
            )
        )
    return layers


def standard_shard_map(model: nn.Module) -> ShardMap:
    """The shard map of megatron-core's own layers: contiguous pieces, but gate and up apart in a gated linear_fc1."""
    modules: dict[str, Any] = dict(model.named_modules())
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()

    def piece(start: int, length: int) -> Ranges:
        return ((start + rank * (length // size), length // size),)

    def shard(name: str) -> tuple[tuple[int, int], Ranges, Ranges]:
        module = modules[name.removesuffix(".weight")]
        d_out, d_in = module.output_size, module.input_size
        if isinstance(module, RowParallelLinear):
            return (d_out, d_in), ((0, d_out),), piece(0, d_in)
        gated = name.endswith("linear_fc1.weight") and module.config.gated_linear_unit
        half = d_out // 2
        return (d_out, d_in), piece(0, half) + piece(half, half) if gated else piece(0, d_out), ((0, d_in),)

    return shard


def megatron_groups() -> Groups:
    """This process's place in megatron-core's parallel state, which must be initialised."""
    tp, dp = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_data_parallel_world_size()
    return Groups(
        tp=parallel_state.get_tensor_model_parallel_group() if tp > 1 else None,
        dp=parallel_state.get_data_parallel_group() if dp > 1 else None,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=dp,
    )


def plain_layers(
    model: nn.Module, *, include_output_layer: bool = False, wanted: Callable[[str], bool] | None = None
) -> list[ScoredLayer]:
    """Trainable nn.Linear layers of a model in one process, activations [batch, tokens, features].

    A weight shared with an embedding is left out: its gradient has a second part that no linear layer sees.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not module.weight.requires_grad or id(module.weight) in embeddings:
            continue
        if (_is_output(name) and not include_output_layer) or (wanted is not None and not wanted(name)):
            continue
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        d_out, d_in = weight.shape
        layers.append(
            ScoredLayer(
                name=name,
                module=module,
                weight=weight,
                d_out=d_out,
                d_in=d_in,
                rows=((0, d_out),),
                cols=((0, d_in),),
                sequence_first=False,
            )
        )
    return layers


def is_megatron(model: nn.Module) -> bool:
    kinds = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
    return any(isinstance(module, kinds) for module in model.modules())


def _is_output(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in OUTPUT_LAYERS
