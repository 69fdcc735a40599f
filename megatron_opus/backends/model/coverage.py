"""How much of a model is scored, and what is not and why."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from megatron_opus.backends.engines.deepspeed.partition import local_shape
from megatron_opus.backends.model.plain_layers import Roles, find_roles, is_conv1d
from megatron_opus.backends.model.scored_layers import OUTPUT_LAYER
from megatron_opus.layout.coverage import Coverage
from megatron_opus.types import ScoredLayer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR = (nn.Linear, ColumnParallelLinear, RowParallelLinear)
NAMES = 3  # named for each reason


def coverage(model: nn.Module, layers: Sequence[ScoredLayer]) -> Coverage:
    """Count the trainable numbers that are scored among those in matrices (parameters of two or more dimensions).

    Of this rank's shards. Vectors (biases, norms) are named beside them and enter neither number: they are few.
    """
    scored = {id(layer.weight) for layer in layers}
    roles = find_roles(model)
    seen: set[int] = set()
    inside, total = 0, 0
    left_out: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            shape = local_shape(parameter)
            n = math.prod(shape)
            if len(shape) >= 2:
                total += n
            if id(parameter) in scored:
                inside += n
                continue
            reason = _reason(model, path, module, parameter, len(shape), roles)
            left_out[reason].append((f"{path}.{name}".lstrip("."), n))
    return Coverage(
        share=inside / total if total else 0.0,
        left_out=tuple(_sentence(reason, found, total) for reason, found in left_out.items()),
    )


def warning(found: Coverage) -> str:
    """Say in one paragraph what is not scored; for a share that is too small to speak for the whole model."""
    return (
        f"{found.share:.2f} of the trainable numbers in the model's matrices are scored; the scores speak for those "
        "alone. Left out: " + "; ".join(found.left_out)
    )


def _sentence(reason: str, found: Sequence[tuple[str, int]], total: int) -> str:
    n = sum(size for _, size in found)
    names = ", ".join(name for name, _ in found[:NAMES]) + (f" and {len(found) - NAMES} more" if found[NAMES:] else "")
    share = "" if reason.startswith("vectors") or not total else f" ({n / total:.2f})"
    return f"{reason}: {n:,} numbers{share}, {names}"


def _reason(model: nn.Module, path: str, module: nn.Module, parameter: nn.Parameter, dims: int, roles: Roles) -> str:
    parts = path.split(".")
    owners = [model.get_submodule(".".join(parts[:k])) for k in range(len(parts))]
    if dims < 2:
        return "vectors (biases, norms)"
    if isinstance(module, VocabParallelEmbedding) or parameter is roles.token:
        return "token embedding (selection.score_embedding is false)"
    if isinstance(module, nn.Embedding):
        return "embeddings of other things than tokens (positions)"
    if parameter is roles.output or path.rsplit(".", 1)[-1] == OUTPUT_LAYER:
        return "output layer (selection.score_output_layer is false)"
    if any(isinstance(m, nn.MultiheadAttention) for m in [module, *owners]):
        return "weights of nn.MultiheadAttention, which uses them without calling a module"
    if "parametrizations" in path.split("."):
        return "weights that a parametrization computes"
    if isinstance(module, _CONVOLUTIONS):
        return "convolutions"
    if isinstance(module, _LINEAR) or is_conv1d(module):
        return "linear layers outside of selection.scored_layers, or not wanted"
    if dims > 2:
        return "parameters of three and more dimensions (experts), which no linear layer holds"
    return "raw parameters, which no linear layer holds (adapters, routers)"
