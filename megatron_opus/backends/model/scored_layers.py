"""Which layers are scored, and which part of each matrix this rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import nn

from megatron_opus.backends.engines.deepspeed.partition import local_shape
from megatron_opus.backends.model import experts, stages, te_layers
from megatron_opus.config import ConfigError, SelectionConfig
from megatron_opus.layout.model_layout import Cut, Kind, ModelLayout, ParameterLayout, block_number, scored_blocks
from megatron_opus.types import ScoredLayer

OUTPUT_LAYER = "output_layer"  # the attribute by which megatron-core's own models know theirs


def megatron_layers(
    model: nn.Module, layout: ModelLayout | None = None, selection: SelectionConfig | None = None
) -> list[ScoredLayer]:
    """List the column- and row-parallel linear layers with trainable weights, in module order.

    They are Megatron's own or Transformer Engine's.

    The (un)embedding is among them where it is asked for. `layout` (default: read off the model) says what each matrix
    is and which piece of it this tensor-parallel rank holds. `selection` (default: its defaults) says which blocks are
    scored, and whether the output layer and the token embedding are. A weight without `requires_grad` is not part of
    the coming update and is left out. Raises ConfigError for a choice that leaves nothing or half of a tied weight, and
    ValueError when a weight does not have the shape that `layout` gives it: the sketches of such a shard would not add
    up.
    """
    selection, layout = selection or SelectionConfig(), layout or built_layout(model)
    rank = parallel_state.get_tensor_model_parallel_rank()
    modules = list(stages.named_modules(model))
    shares = any(getattr(piece, "share_embeddings_and_output_weights", False) for piece in stages.pieces(model))
    found_embedding = next(((n, m) for n, m in modules if isinstance(m, VocabParallelEmbedding)), None)
    embedding = found_embedding[0] if found_embedding else stages.EMBEDDING
    layers, tied_model = [], shares
    if any(te_layers.parallel_mode(m) or te_layers.grouped_weights(m) for _, m in modules):
        te_layers.check(stages.pieces(model)[0].config, [m for _, m in modules])
    owners = {n: m for n, m in modules if isinstance(m, MoELayer)}
    routings = {n: experts.DispatchedSequences(m) for n, m in owners.items()}
    apart = parallel_state.get_expert_model_parallel_world_size() > 1
    for name, module in modules:
        if name.rpartition(".")[0] in owners and isinstance(module, Router | SharedExpertMLP):
            layers += _beside_experts(name, module)
        if te_layers.grouped_weights(module):
            owner = name.rpartition(".experts.")[0]
            layers += _grouped_experts(owner, name, module, owners[owner], routings[owner], layout, apart)
            continue
        engine = te_layers.parallel_mode(module)
        if engine is None and not isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            continue
        # a tied output layer is another use of the embedding's weight; on another pipeline stage it has a copy of it
        tied = module.weight is None or (shares and _is_output(name))
        tied_model |= tied
        matrix = embedding if tied else name
        entry = layout[f"{matrix}.weight"]
        is_embedding = entry.kind == "embedding" and not tied
        is_output = entry.kind == "output" or tied
        if (is_embedding and not selection.score_embedding) or (is_output and not selection.score_output_layer):
            continue
        weight: Any = found_embedding[1].weight if module.weight is None and found_embedding else module.weight
        if not weight.requires_grad:
            continue
        if tied and not selection.score_embedding:
            raise ConfigError(half_of_a_tied_weight("score_output_layer", "score_embedding"))
        local, found = layout.local_shape(entry.name), local_shape(weight)
        if found != local:
            raise ValueError(f"{entry.name}: expected the local shape {local}, got {found}")
        by_columns = entry.cut == "columns"
        owner, _, number = name.partition(".experts.local_experts.")
        own: dict[str, Any] = {}
        if number:
            first = cast(MoELayer, owners[owner]).local_expert_indices[0]
            own = {"routing": routings[owner], "expert": int(number.split(".")[0]) - first, "apart": apart}
            own["slot"] = f"{owner}.experts"
        scattered = bool(module.reduce_scatter_embeddings if is_embedding else module.sequence_parallel) and not own
        rows, cols = layout.shard(entry.name, rank)
        layers.append(
            ScoredLayer(
                name=matrix,
                module=module,
                weight=weight,
                d_out=entry.shape[0],
                d_in=entry.shape[1],
                rows=rows,
                cols=cols,
                sequence_first=scattered if is_embedding else True,
                embedding=is_embedding,
                cut="cols" if by_columns else "rows",
                input_scattered=scattered and not by_columns and not is_embedding,
                output_scattered=scattered and (by_columns or is_embedding),
                input_of=None if engine is None else te_layers.input_of(module),
                **own,
            )
        )
    if tied_model and selection.score_embedding and not selection.score_output_layer:
        raise ConfigError(half_of_a_tied_weight("score_embedding", "score_output_layer"))
    pipelined = parallel_state.get_pipeline_model_parallel_world_size() > 1
    blocks = range(stages.pieces(model)[0].config.num_layers) if pipelined else None
    return of_blocks(layers, selection.scored_layers, blocks)


def _grouped_experts(
    owner: str,
    name: str,
    module: nn.Module,
    layer: Any,
    routing: experts.DispatchedSequences,
    layout: ModelLayout,
    apart: bool,
) -> list[ScoredLayer]:
    """The matrices of all experts of this rank in one grouped layer, under the names of experts that are modules."""
    found, first, part = [], layer.local_expert_indices[0], name.rpartition(".")[2]
    for number, weight in enumerate(te_layers.grouped_weights(module)):
        matrix = f"{owner}.experts.local_experts.{first + number}.{part}"
        entry = layout[f"{matrix}.weight"]
        if not weight.requires_grad:
            continue
        if local_shape(weight) != entry.shape:
            raise ValueError(f"{entry.name}: expected the shape {entry.shape}, got {local_shape(weight)}")
        own = {"routing": routing, "expert": number, "apart": apart, "slot": f"{owner}.experts"}
        found.append(_uncut(matrix, routing.products[module][number], weight, **own))
    return found


def _beside_experts(name: str, module: Any) -> list[ScoredLayer]:
    """The router or the gate of shared experts: whole on every rank, which reads its own tokens alone."""
    router = isinstance(module, Router)
    weight, matrix = (module.weight, name) if router else (module.gate_weight, f"{name}.gate_weight")
    if weight is None or not weight.requires_grad:
        return []
    product, shown = experts.shown_router(module) if router else experts.shown_gate(module)
    return [_uncut(matrix, product, weight, replicated=True, own_tokens=True, shown=shown)]


def _uncut(name: str, module: nn.Module, weight: nn.Parameter, **own: Any) -> ScoredLayer:
    """A matrix that tensor parallelism does not cut, whose product goes through a module of its own."""
    rows, columns = local_shape(weight)
    return ScoredLayer(
        name=name,
        module=module,
        weight=weight,
        d_out=rows,
        d_in=columns,
        rows=((0, rows),),
        cols=((0, columns),),
        sequence_first=True,
        **own,
    )


def built_layout(model: nn.Module) -> ModelLayout:
    """Read the layout off megatron-core's own layers: for a model of which no configuration of ours exists.

    Their shards are contiguous, but gate and up are apart in a gated linear_fc1.
    """
    found: dict[str, ParameterLayout] = {}
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    for piece in stages.pieces(model):
        modules = dict(piece.named_modules())
        for local, parameter in piece.named_parameters():
            owner, _, leaf = local.rpartition(".")
            module, shape = modules[owner], local_shape(parameter)
            cut: Cut | None = None
            halves = False
            kind: Kind = "bias" if leaf == "bias" else "linear" if len(shape) > 1 else "norm"
            if isinstance(module, VocabParallelEmbedding):
                kind, cut, shape = "embedding", "rows", (module.num_embeddings, module.embedding_dim)
            elif isinstance(module, nn.Embedding):
                kind = "positions"
            elif isinstance(module, ColumnParallelLinear):
                halves = owner.endswith("linear_fc1") and module.config.gated_linear_unit
                cut, shape = "rows", (module.output_size, module.input_size)[: len(shape)]
                kind = "output" if _is_output(owner) else kind
            elif isinstance(module, RowParallelLinear) and leaf == "weight":
                cut, shape = "columns", (module.output_size, module.input_size)
            elif mode := te_layers.parallel_mode(module):
                if leaf == "weight" or (leaf == "bias" and mode == "column"):
                    cut = "rows" if mode == "column" else "columns"
                    dim = 0 if cut == "rows" else 1
                    shape = (*shape[:dim], shape[dim] * tp_size, *shape[dim + 1 :])
                    halves = owner.endswith("linear_fc1") and piece.config.gated_linear_unit
            elif isinstance(module, Router | SharedExpertMLP) and len(shape) > 1:
                kind = "router"
            if ".local_experts." in owner:
                cut = None  # expert tensor parallelism is refused
            name = stages.global_name(piece, local)
            if name != local and kind == "output":
                kind = "embedding"  # the last stage's copy of a tied weight
            found.setdefault(name, ParameterLayout(name=name, kind=kind, shape=shape, cut=cut, halves=halves))
    ep_size = parallel_state.get_expert_model_parallel_world_size()
    return ModelLayout(parameters=tuple(found.values()), tp_size=tp_size, ep_size=ep_size)


def half_of_a_tied_weight(given: str, missing: str) -> str:
    """Say that one of the two uses of a tied weight was asked for without the other."""
    return (
        f"selection.{given}: the output layer and the token embedding share one weight, whose gradient has a part from "
        f"each; expected selection.{missing}=true as well, got false"
    )


def of_blocks(layers: Sequence[ScoredLayer], which: str, of: Sequence[int] | None = None) -> list[ScoredLayer]:
    """Keep the layers of the blocks that `selection.scored_layers` names; those outside blocks ((un)embedding) stay.

    `all`; `last:K`, the K blocks nearest the loss, where the backward pass then ends; `every:K`, every K-th counted
    from the last. `of` numbers the whole model's blocks, where `layers` are those of one pipeline stage. Raises
    ConfigError when there are fewer blocks.
    """
    numbers = [block_number(layer.name) for layer in layers]
    blocks = sorted({n for n in numbers if n is not None}) if of is None else list(of)
    if int(which.partition(":")[2] or 0) > len(blocks):
        raise ConfigError(f"selection.scored_layers: expected at most the model's {len(blocks)} blocks, got {which}")
    chosen = scored_blocks(blocks, which)
    return [layer for layer, n in zip(layers, numbers, strict=True) if n is None or n in chosen]


def is_megatron(model: nn.Module) -> bool:
    """True for a model with tensor-parallel layers of megatron-core."""
    kinds = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
    return any(isinstance(module, kinds) for module in model.modules())


def _is_output(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == OUTPUT_LAYER
