"""Parallel groups, the GPT of megatron-core, and its per-token loss.

Initial weights are a function of (seed, parameter name) on the whole parameter, of which each tensor-parallel rank
takes its piece: every degree starts from the same model.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor, nn

from megatron_opus.backends.model import cpu_shims, extras, releases, stages
from megatron_opus.backends.model.attention import DocumentMask, SdpaCoreAttention, TransformerEngineCoreAttention
from megatron_opus.backends.model.parallel import derived_seed, init_parallel, rng_tracker, seed_all
from megatron_opus.config import ConfigError, ModelConfig
from megatron_opus.config.dimensions import expert_ffn_size, ffn_size, head_channels, query_groups
from megatron_opus.layout.model_layout import ModelLayout, model_layout
from megatron_opus.types import Batch, Ranges

__all__ = ["build_gpt", "forward_loss", "init_parallel", "rng_tracker", "seed_all"]

# GPT-2's GELU is the tanh approximation. Megatron's fused kernel computes it too, its unfused default does not: named
# here so that a CPU and a GPU train the same function.
_GELU = functools.partial(nn.functional.gelu, approximate="tanh")


# --- the model ------------------------------------------------------------------------------------------------------


def transformer_config(
    config: ModelConfig,
    *,
    params_dtype: torch.dtype,
    tp_size: int,
    sequence_parallel: bool,
    device: Literal["cpu", "cuda", "meta"],
    recompute: Literal["none", "full"] = "none",
    dispatcher: str = "allgather",
) -> TransformerConfig:
    """Megatron's configuration of this model on this device. Fusions only on CUDA, and only those without extras."""
    cuda = device == "cuda"
    pp_size = parallel_state.get_pipeline_model_parallel_world_size()
    pipeline: dict[str, Any] = {}
    if pp_size > 1:
        pipeline = {
            "pipeline_model_parallel_size": pp_size,
            "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
            "microbatch_group_size_per_vp_stage": pp_size,
            "pipeline_dtype": params_dtype,
            "deallocate_pipeline_outputs": True,
        }
    if config.num_moe_experts is not None:
        pipeline |= {
            "num_moe_experts": config.num_moe_experts,
            "moe_router_topk": config.moe_router_topk,
            "moe_ffn_hidden_size": expert_ffn_size(config),
            "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
            "moe_shared_expert_gate": config.moe_shared_expert_gate,
            "moe_router_load_balancing_type": "aux_loss" if config.moe_aux_loss_coeff else "none",
            "moe_aux_loss_coeff": config.moe_aux_loss_coeff,
            "moe_token_dispatcher_type": dispatcher,
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "expert_tensor_parallel_size": 1,
        }
    fused_gelu = cuda and config.add_bias_linear and not config.swiglu
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=query_groups(config),
        kv_channels=head_channels(config),
        ffn_hidden_size=ffn_size(config),
        normalization=config.normalization,
        layernorm_epsilon=config.layernorm_epsilon,
        add_bias_linear=config.add_bias_linear,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        gated_linear_unit=config.swiglu,
        activation_func=nn.functional.silu if config.swiglu else (nn.functional.gelu if fused_gelu else _GELU),
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        init_method_std=config.init_method_std,
        tensor_model_parallel_size=tp_size,
        sequence_parallel=sequence_parallel and tp_size > 1,
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        use_cpu_initialization=not cuda,
        perform_initialization=False,  # done by _init_weights, the same at every tensor-parallel degree
        gradient_accumulation_fusion=False,  # would write into main_grad buffers that DeepSpeed does not have
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        batch_p2p_sync=False,
        recompute_granularity=None if recompute == "none" else "full",
        recompute_method=None if recompute == "none" else "uniform",
        recompute_num_layers=None if recompute == "none" else 1,
        bias_dropout_fusion=cuda,
        # The fused GELU needs a bias to add; without one, PyTorch's kernel is already a single one.
        bias_activation_fusion=fused_gelu or (cuda and config.swiglu),
        **pipeline,
    )


def build_gpt(
    config: ModelConfig,
    *,
    seq_length: int,
    params_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sequence_parallel: bool = False,
    recompute: Literal["none", "full"] = "none",
    device: Literal["cpu", "cuda", "meta"] | None = None,
    sums_gradients: bool = True,
    dispatcher: str = "allgather",
) -> Any:
    """GPTModel of this rank, initialised, in `params_dtype`, on `device` (default: the accelerator, else the CPU).

    A pipeline stage gets its own layers alone; with virtual stages, an nn.ModuleList of one GPTModel for each.
    `sums_gradients` says whether the backward pass adds up over tensor-parallel ranks the gradients that each sees in
    part (norms under sequence parallelism); False where Megatron's `finalize_model_grads` does it.

    Call `init_parallel` first. Only one whole matrix is in memory beside the model at any time. On `meta` nothing is
    allocated. Raises ConfigError when the model cannot be divided by the tensor-parallel degree or has too few
    positions, and RuntimeError when an attention backend that was asked for is missing.
    """
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    ep_size = parallel_state.get_expert_model_parallel_world_size()
    layout = model_layout(config, tp_size=tp_size, ep_size=ep_size, positions=seq_length)
    positions = config.max_position_embeddings or seq_length
    if config.position_embedding_type == "learned_absolute" and positions < seq_length:
        raise ConfigError(f"model.max_position_embeddings: expected at least {seq_length}, got {positions}")
    vocabulary, _ = layout.output.shape
    kind: Literal["cpu", "cuda", "meta"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
    megatron_config = transformer_config(
        config,
        params_dtype=params_dtype,
        tp_size=tp_size,
        sequence_parallel=sequence_parallel,
        device=kind,
        recompute=recompute,
        dispatcher=dispatcher,
    )
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    built = []
    for vp_stage in [None] if virtual is None else range(virtual):
        # Megatron moves a tied output weight of a last stage by .cuda()
        with torch.device(kind), cpu_shims.cuda_names():
            piece = GPTModel(
                config=megatron_config,
                transformer_layer_spec=_layer_specs(
                    config, get_num_layers_to_build(megatron_config, vp_stage=vp_stage)
                ),
                vocab_size=vocabulary,
                max_sequence_length=positions,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
                parallel_output=True,
                share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
                position_embedding_type=config.position_embedding_type,
                rotary_base=config.rotary_base,
                vp_stage=vp_stage,
            )
        built.append(piece.to(dtype=params_dtype))
    model = built[0] if len(built) == 1 else nn.ModuleList(built)
    _mark_parameters(model, layout)
    if kind != "meta":
        _init_weights(model, config, layout, tp_rank=tp_rank, seed=seed)
    if tp_size > 1 and sums_gradients:
        _sum_partial_gradients(model)
    if config.vocab_size is not None and config.vocab_size < vocabulary and built[-1].post_process:
        _exclude_padding(built[-1], config.vocab_size - tp_rank * (vocabulary // tp_size))
    return model


class Norm(nn.Module):
    """LayerNorm or RMSNorm for a Megatron layer spec; knows sequence parallelism, which Megatron's own refuses."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """A torch.nn norm over the last dimension, parameters in `config.params_dtype`, marked."""
        kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def _layer_specs(config: ModelConfig, layers: int) -> TransformerBlockSubmodules:
    chosen = extras.attention_backend(config.attention_backend, extras.detect_transformer_engine())
    if config.num_moe_experts is not None:
        releases.name_missing_kernels()
        cpu_shims.install_dispatcher()
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.core_attention = TransformerEngineCoreAttention if chosen == "transformer_engine" else SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm)


def _mark_parameters(model: nn.Module, layout: ModelLayout) -> None:
    """Say on each parameter whether it is a shard: DeepSpeed counts replicated ones once in the gradient norm."""
    for name, parameter in stages.named_parameters(model):
        # Megatron counts a copy of another tensor-parallel rank once; every rank's experts are its own
        apart = layout[name].expert is not None and layout.ep_size > 1
        sharded = apart or (layout[name].cut is not None and layout.tp_size > 1)
        for attribute, value in (
            ("model_parallel", sharded),
            ("tensor_model_parallel", sharded),
            ("partition_dim", {"rows": 0, "columns": 1, None: -1}[layout[name].cut]),
            ("partition_stride", 1),
        ):
            setattr(parameter, attribute, value)


@torch.no_grad()
def _init_weights(model: nn.Module, config: ModelConfig, layout: ModelLayout, *, tp_rank: int, seed: int) -> None:
    """Apply Megatron's rules: N(0, std), residual output layers N(0, std / sqrt(2 * layers)), norms 1, biases 0.

    The layers that write to the residual stream are those that are cut by columns, and the second ones of experts.
    """
    for name, parameter in stages.named_parameters(model):
        entry = layout[name]
        if entry.kind in ("norm", "bias"):
            parameter.fill_(1.0 if entry.kind == "norm" else 0.0)
            continue
        to_residual = entry.cut == "columns" or (entry.expert is not None and "linear_fc2" in name)
        std = config.init_method_std / (math.sqrt(2.0 * config.num_layers) if to_residual else 1.0)
        generator = torch.Generator().manual_seed(derived_seed(seed, "weights", name))
        value = torch.empty(entry.shape, device="cpu").normal_(0.0, std, generator=generator)
        for dim, ranges in enumerate(layout.shard(name, tp_rank)):
            value = _cut(value, ranges, dim)
        parameter.copy_(value)


def _cut(whole: Tensor, ranges: Ranges, dim: int) -> Tensor:
    pieces = [whole.narrow(dim, start, length) for start, length in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _exclude_padding(model: GPTModel, first: int) -> None:
    """Give rows `first` and above of this rank's part of the vocabulary probability 0: no token has them.

    GPT-2's logits lie far below zero, so that a padding row of zeros would take nearly all of the probability. In
    place: a second copy of the logits would be the largest tensor of the step.
    """

    def hook(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        logits = output[0]
        logits[..., max(0, first) :] = torch.finfo(logits.dtype).min

    if first < model.output_layer.output_size_per_partition:
        model.output_layer.register_forward_hook(hook)


def _sum_partial_gradients(model: nn.Module) -> None:
    """Sum over the tensor-parallel group the gradients of replicated parameters that each rank sees only in part.

    Under sequence parallelism every rank normalises its own tokens, and query/key norms see only the rank's own heads.
    Done in the backward pass, before DeepSpeed takes the gradient: later it is a fragment of a flat buffer.
    """
    group = parallel_state.get_tensor_model_parallel_group()

    def reduced(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        torch.distributed.all_reduce(gradient, group=group)
        return gradient

    for name, parameter in stages.named_parameters(model):
        if getattr(parameter, "sequence_parallel", False) or ".q_layernorm." in name or ".k_layernorm." in name:
            parameter.register_hook(reduced)


# --- the loss -------------------------------------------------------------------------------------------------------


def forward_loss(model: Any, batch: Batch) -> Tensor:
    """Per-token losses [B, L], float32, of a GPTModel or of the engine around one; the mask is not applied.

    Labels are taken as they are: labels[b, t] follows tokens[b, t]. With `document_ids`, attention stays within each
    document. The same on every tensor-parallel rank. Raises ValueError when the sequence does not fit the model.
    """
    return forward_piece(model, batch).float()


def forward_piece(model: Any, batch: Batch) -> Tensor:
    """Run what one stage holds of the model: token losses [B, L] on the last, hidden states [L, B, h] elsewhere.

    A stage that is not the first takes its input from `set_input_tensor`, as Megatron's schedules give it.
    """
    gpt = model.module if hasattr(model, "module") else model
    length = batch.tokens.shape[1]
    learned = gpt.position_embedding_type == "learned_absolute"
    if learned and length > gpt.max_sequence_length:
        raise ValueError(f"sequence length: expected at most {gpt.max_sequence_length} positions, got {length}")
    config = gpt.config
    if config.sequence_parallel and length % config.tensor_model_parallel_size:
        raise ValueError(
            f"sequence length: expected a multiple of tensor_model_parallel_size ({config.tensor_model_parallel_size}) "
            f"under sequence parallelism, got {length}; pad it or set parallel.sequence_parallel=false"
        )
    if batch.document_ids is not None and config.context_parallel_size > 1:
        raise ValueError(
            "document_ids: expected none with context parallelism, whose attention takes no mask here; set "
            "data.reset_attention_mask=false"
        )
    documents = None if batch.document_ids is None else DocumentMask.from_ids(batch.document_ids)
    # What recomputation keeps of a layer's arguments must be tensors; it passes the bias by without keeping it.
    recomputed = config.recompute_granularity == "full" and gpt.training
    bias = {"extra_block_kwargs": {"attention_bias": documents}} if recomputed and documents is not None else {}
    output: Tensor = model(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=None if bias else documents,
        labels=batch.labels,
        **bias,
    )
    return output
