"""Which layers of a model without tensor parallelism are scored, and what its embeddings and its output layer are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from megatron_opus.backends.engines.deepspeed.partition import local_shape
from megatron_opus.backends.model import hf_experts
from megatron_opus.backends.model.scored_layers import half_of_a_tied_weight, of_blocks
from megatron_opus.config import ConfigError, SelectionConfig
from megatron_opus.types import ScoredLayer


@dataclass(frozen=True)
class Roles:
    """Weights of the token embedding and of the output layer, by identity; equal where they are tied."""

    token: nn.Parameter | None
    output: nn.Parameter | None


def plain_layers(
    model: nn.Module, selection: SelectionConfig | None = None, *, wanted: Callable[[str], bool] | None = None
) -> list[ScoredLayer]:
    """List the trainable nn.Linear (and transformers' Conv1D) layers of a model, in module order.

    `selection` (default: its defaults) says which blocks are scored, and whether the output layer and the token
    embedding are; other embeddings (positions) are not. `wanted` further restricts by module name. Layers whose weight
    is one parameter have the name of the first of them. Raises ConfigError.
    """
    selection = selection or SelectionConfig()
    roles = find_roles(model)
    _check_tied(roles, selection)
    names: dict[int, str] = {}
    layers = []
    for name, module, weight in matrices(model):
        if hf_experts.is_experts(module):
            layers += [x for x in hf_experts.scored(name, module) if wanted is None or wanted(x.name)]
            continue
        is_output = weight is roles.output
        if isinstance(module, nn.Embedding):
            if weight is not roles.token or not selection.score_embedding:
                continue
        elif is_output and not selection.score_output_layer:
            continue
        if wanted is not None and not wanted(name):
            continue
        shape = local_shape(weight)
        layers.append(
            ScoredLayer(
                name=names.setdefault(id(weight), name),
                module=module,
                weight=weight,
                d_out=shape[0],
                d_in=shape[1],
                rows=((0, shape[0]),),
                cols=((0, shape[1]),),
                sequence_first=False,
                embedding=isinstance(module, nn.Embedding),
                transposed=is_conv1d(module),
            )
        )
    return of_blocks(layers, selection.scored_layers)


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every module whose trainable weight a forward hook can see the factors of: (name, module, weight)."""
    inside = {id(part) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for part in m.modules()}
    for name, module in model.named_modules():
        weight = _weight(module)
        if hf_experts.is_experts(module):
            yield name, module, module.gate_up_proj
        if weight is None or not weight.requires_grad or id(module) in inside or 0 in local_shape(weight):
            continue  # nn.MultiheadAttention uses the weights of its parts without calling them
        if isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module) or hf_experts.is_router(module):
            yield name, module, weight


def find_roles(model: nn.Module) -> Roles:
    """Find the token embedding and the output layer from the module graph.

    A model of transformers says it itself. Elsewhere the output layer is the linear layer that shares its weight with
    an embedding, or the last one whose weight has the shape of an embedding's: [vocabulary, features]; that embedding
    is the tokens'. Without such a layer, an only embedding is the tokens'.
    """
    told = [_weight_of(model, f"get_{side}_embeddings") for side in ("input", "output")]
    if told[0] is not None:
        return Roles(*told)
    embeddings = [_weight(m) for m in model.modules() if isinstance(m, nn.Embedding)]
    linear = [_weight(m) for m in model.modules() if isinstance(m, nn.Linear)]
    for alike in (lambda a, b: a is b, lambda a, b: local_shape(a) == local_shape(b)):
        for output in linear[::-1]:
            for token in embeddings:
                if output is not None and token is not None and alike(output, token):
                    return Roles(token, output)
    return Roles(embeddings[0] if len(embeddings) == 1 else None, None)


def is_conv1d(module: nn.Module) -> bool:
    """Tell transformers' Conv1D (GPT-2), a linear layer whose weight is stored [in, out], without importing it."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def bare_model(model: nn.Module) -> nn.Module:
    """Take a model out of DistributedDataParallel or a DeepSpeed engine. Raises ConfigError for what hides its layers.

    Compiled and scripted modules run without the hooks of their parts; FSDP keeps weights in pieces under other names.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got {model!r:.80}")
    while isinstance(model, DistributedDataParallel) or any(
        c.__name__ == "DeepSpeedEngine" for c in type(model).__mro__
    ):
        model = model.get_submodule("module")
    for name, module in [("model", model), *list(model.named_modules())[1:]]:
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ConfigError(
                f"{name}: hooks do not fire inside a module of torch.compile; pass the uncompiled model (it shares the "
                "weights, so that the compiled one can be trained beside it)"
            )
        if type(module).__module__.startswith("torch.jit"):
            raise ConfigError(f"{name}: hooks do not fire inside a scripted module; pass the model it was made from")
        if {c.__name__ for c in type(module).__mro__} & {"FSDPModule", "FullyShardedDataParallel"}:
            raise ConfigError(_FSDP.format(name))
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            raise ConfigError(_FSDP.format(name))
        if parameter.is_meta or isinstance(parameter, UninitializedParameter):
            kind = "on the meta device or offloaded" if parameter.is_meta else "of a lazy module that was never called"
            raise ConfigError(
                f"{name}: expected a weight with values, got one without ({kind}); load or initialise the model as a "
                "whole, and run it forward once, before its optimizer and its scorer are built"
            )
        if parameter.is_complex():
            raise ConfigError(f"{name}: expected real numbers, got {parameter.dtype}, whose gradients are not scored")
    return model


_FSDP = (
    "{}: expected whole weights, got a part of FSDP or a DTensor, whose gradients and optimizer state lie in pieces on "
    "other ranks; score a whole copy of the model and its optimizer state (torch.distributed.checkpoint.state_dict, "
    "full_state_dict=True), or shard with DeepSpeed ZeRO or Megatron, whose pieces can be read"
)


def is_dtensor(value: Tensor) -> bool:
    return hasattr(value, "device_mesh") and hasattr(value, "placements")


def _weight_of(model: nn.Module, method: str) -> nn.Parameter | None:
    get = getattr(model, method, None)
    if get is None:
        return None
    try:
        found = get()
    except NotImplementedError:
        return None
    return _weight(found) if isinstance(found, nn.Module) else None


def _weight(module: nn.Module) -> nn.Parameter | None:
    """The module's own weight; None where a parametrization computes it."""
    return module._parameters.get("weight")


def _check_tied(roles: Roles, selection: SelectionConfig) -> None:
    if roles.token is None or roles.token is not roles.output or not roles.token.requires_grad:
        return
    given = {"score_embedding": selection.score_embedding, "score_output_layer": selection.score_output_layer}
    for name, other in (("score_embedding", "score_output_layer"), ("score_output_layer", "score_embedding")):
        if given[name] and not given[other]:
            raise ConfigError(half_of_a_tied_weight(name, other))
