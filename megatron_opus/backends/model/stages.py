"""The pieces of a model that pipeline stages hold, under the names that the whole model has.

Megatron numbers the layers of each piece from 0 and gives a tied output layer on the last stage a copy of the weight:

    piece of layers 4..7    decoder.layers.0.mlp.linear_fc1.weight   ->  decoder.layers.4.mlp.linear_fc1.weight
    tied output layer       output_layer.weight                      ->  embedding.word_embeddings.weight
    experts 2 and 3 of 4    ..mlp.experts.local_experts.0.linear_fc1 ->  ..mlp.experts.local_experts.2.linear_fc1
    the same, grouped       ..mlp.experts.linear_fc1.weight0         ->  ..mlp.experts.local_experts.2.linear_fc1.weight

Initial weights, hashes of the sketches, checksums and checkpoints go by the names on the right: they are the same for
every layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

EMBEDDING, OUTPUT = "embedding.word_embeddings", "output_layer"


def pieces(model: nn.Module) -> list[Any]:
    """Return the pieces of a model on this rank: itself, or one for each virtual stage (an nn.ModuleList)."""
    return list(model) if isinstance(model, nn.ModuleList) else [model]


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield this rank's parameters under their names in the whole model."""
    for piece in pieces(model):
        for name, parameter in piece.named_parameters():
            yield global_name(piece, name), parameter


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield this rank's modules under their names in the whole model; an output layer keeps its own name."""
    for piece in pieces(model):
        for name, module in piece.named_modules():
            yield _global_layer(piece, name), module


def global_name(piece: nn.Module, name: str) -> str:
    """Return the whole model's name of the parameter that `piece` calls `name`."""
    if name == f"{OUTPUT}.weight" and getattr(piece, "share_embeddings_and_output_weights", False):
        return f"{EMBEDDING}.weight"
    return _global_layer(piece, name)


def first_layer(piece: Any) -> int:
    """Return the number, from 0, that the first layer of this piece has in the whole model."""
    layers = getattr(getattr(piece, "decoder", None), "layers", None)
    return int(layers[0].layer_number) - 1 if layers else 0


def _global_layer(piece: nn.Module, name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
        parts[2] = str(int(parts[2]) + first_layer(piece))
    grouped = re.fullmatch(r"weight(\d+)", parts[-1]) if parts[-3:-2] == ["experts"] else None
    if grouped is not None:  # Transformer Engine's grouped layers
        owner: Any = piece.get_submodule(".".join(name.split(".")[:-3]))
        number = int(grouped[1]) + owner.local_expert_indices[0]
        return ".".join([*parts[:-2], "local_experts", str(number), parts[-2], "weight"])
    if "local_experts" in parts[:-1]:
        number = parts.index("local_experts") + 1
        layer: Any = piece.get_submodule(".".join(name.split(".")[: number - 2]))
        parts[number] = str(int(parts[number]) + layer.local_expert_indices[0])
    return ".".join(parts)
