"""Which layers are scored, and which part of each matrix this rank holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from megatron_opus.backends.engines.deepspeed.partition import local_shape
from megatron_opus.config import ConfigError, SelectionConfig
from megatron_opus.types import Ranges, ScoredLayer

# name -> (whole shape (d_out, d_in), rows of this rank, columns of this rank)
ShardMap = Callable[[str], tuple[tuple[int, int], Ranges, Ranges]]

OUTPUT_LAYER = "output_layer"  # the attribute by which megatron-core's own models know theirs


def megatron_layers(
    model: nn.Module, shard_map: ShardMap, selection: SelectionConfig | None = None
) -> list[ScoredLayer]:
    """Column- and RowParallelLinear layers with trainable weights, in module order; (un)embedding where asked for.

    `selection` (default: its defaults) says which blocks are scored, and whether the output layer and the token
    embedding are. A weight without `requires_grad` is not part of the coming update and is left out. Raises
    ConfigError for a choice that leaves nothing or half of a tied weight, and ValueError when a weight does not have
    the shape that `shard_map` gives it: the sketches of such a shard would not add up.
    """
    selection = selection or SelectionConfig()
    embedding = next((n for n, m in model.named_modules() if isinstance(m, VocabParallelEmbedding)), "")
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            continue
        is_embedding, is_output = isinstance(module, VocabParallelEmbedding), _is_output(name)
        if (is_embedding and not selection.score_embedding) or (is_output and not selection.score_output_layer):
            continue
        # a tied output layer has no weight of its own: it is another use of the embedding's
        tied = module.weight is None
        matrix = embedding if tied else name
        weight = model.get_parameter(f"{matrix}.weight")
        if not weight.requires_grad:
            continue
        if tied and not selection.score_embedding:
            raise ConfigError(half_of_a_tied_weight("score_output_layer", "score_embedding"))
        whole, rows, cols = shard_map(f"{matrix}.weight")
        local, found = (sum(n for _, n in rows), sum(n for _, n in cols)), local_shape(weight)
        if found != local:
            raise ValueError(f"{matrix}.weight: expected the local shape {local}, got {found}")
        row_parallel = isinstance(module, RowParallelLinear)
        scattered = bool(module.reduce_scatter_embeddings if is_embedding else module.sequence_parallel)
        layers.append(
            ScoredLayer(
                name=matrix,
                module=module,
                weight=weight,
                d_out=whole[0],
                d_in=whole[1],
                rows=rows,
                cols=cols,
                sequence_first=scattered if is_embedding else True,
                embedding=is_embedding,
                cut="cols" if row_parallel else "rows",
                input_scattered=scattered and not row_parallel and not is_embedding,
                output_scattered=scattered and (row_parallel or is_embedding),
            )
        )
    tied_model = any(_is_output(n) and getattr(m, "weight", 0) is None for n, m in model.named_modules())
    if tied_model and selection.score_embedding and not selection.score_output_layer:
        raise ConfigError(half_of_a_tied_weight("score_embedding", "score_output_layer"))
    return of_blocks(layers, selection.scored_layers)


def half_of_a_tied_weight(given: str, missing: str) -> str:
    """Say that one of the two uses of a tied weight was asked for without the other."""
    return (
        f"selection.{given}: the output layer and the token embedding share one weight, whose gradient has a part from "
        f"each; expected selection.{missing}=true as well, got false"
    )


def of_blocks(layers: Sequence[ScoredLayer], which: str) -> list[ScoredLayer]:
    """The layers of the blocks that `selection.scored_layers` names; those outside blocks ((un)embedding) stay.

    `all`; `last:K`, the K blocks nearest the loss, where the backward pass then ends; `every:K`, every K-th counted
    from the last. A block is the first number in a layer's name. Raises ConfigError when there are fewer blocks.
    """
    if which == "all":
        return list(layers)
    kind, _, number = which.partition(":")
    found = [re.search(r"\.(\d+)\.", layer.name) for layer in layers]
    blocks = sorted({int(m.group(1)) for m in found if m})
    k = int(number)
    if k > len(blocks):
        raise ConfigError(f"selection.scored_layers: expected at most the model's {len(blocks)} blocks, got {which}")
    chosen = set(blocks[-k:] if kind == "last" else blocks[::-1][::k])
    return [x for x, m in zip(layers, found, strict=True) if m is None or int(m.group(1)) in chosen]


def standard_shard_map(model: nn.Module) -> ShardMap:
    """The shard map of megatron-core's own layers: contiguous pieces, but gate and up apart in a gated linear_fc1."""
    modules: dict[str, Any] = dict(model.named_modules())
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()

    def piece(start: int, length: int) -> Ranges:
        return ((start + rank * (length // size), length // size),)

    def shard(name: str) -> tuple[tuple[int, int], Ranges, Ranges]:
        module = modules[name.removesuffix(".weight")]
        if isinstance(module, VocabParallelEmbedding):
            vocabulary, width = module.num_embeddings, module.embedding_dim
            return (vocabulary, width), piece(0, vocabulary), ((0, width),)
        d_out, d_in = module.output_size, module.input_size
        if isinstance(module, RowParallelLinear):
            return (d_out, d_in), ((0, d_out),), piece(0, d_in)
        gated = name.endswith("linear_fc1.weight") and module.config.gated_linear_unit
        half = d_out // 2
        return (d_out, d_in), piece(0, half) + piece(half, half) if gated else piece(0, d_out), ((0, d_in),)

    return shard


def is_megatron(model: nn.Module) -> bool:
    kinds = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
    return any(isinstance(module, kinds) for module in model.modules())


def _is_output(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == OUTPUT_LAYER
