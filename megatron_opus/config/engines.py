"""What each engine can run: combinations of `parallel` and `optimizer` keys are refused before anything is built."""

from __future__ import annotations

from megatron_opus.config.dimensions import head_channels
from megatron_opus.config.recipe import OptimizerConfig, RunConfig, keeps_second_moment
from megatron_opus.config.schema import ConfigError, require


def check_engine(config: RunConfig) -> None:
    """Raise ConfigError for `parallel` keys that the chosen engine does not have, whatever the number of processes."""
    p = config.parallel
    if p.pipeline_model_parallel_size < 1:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size: expected a positive number, got {p.pipeline_model_parallel_size}"
        )
    _check_experts(config)
    if p.engine == "deepspeed":
        _check_deepspeed(config)
    else:
        _check_megatron(config)


def _check_experts(config: RunConfig) -> None:
    m, p = config.model, config.parallel
    tp, ep, experts = p.tensor_model_parallel_size, p.expert_model_parallel_size, m.num_moe_experts
    shared = m.moe_shared_expert_intermediate_size
    if experts is None:
        require(ep == 1, f"parallel.expert_model_parallel_size: expected 1 without model.num_moe_experts, got {ep}")
        require(
            shared is None,
            f"model.moe_shared_expert_intermediate_size: expected null without num_moe_experts, got {shared}",
        )
        return
    require(
        2 <= m.moe_router_topk <= experts,
        f"model.moe_router_topk: expected 2 to num_moe_experts ({experts}), got {m.moe_router_topk}; the softmax over "
        "one chosen expert would be 1, and the router would learn nothing",
    )
    require(
        experts % ep == 0,
        f"parallel.expert_model_parallel_size: expected a divisor of num_moe_experts ({experts}), got {ep}",
    )
    require(not m.add_bias_linear, "model.add_bias_linear: expected false with num_moe_experts, got true")
    require(
        not m.moe_shared_expert_gate or shared is not None,
        "model.moe_shared_expert_gate: expected false without moe_shared_expert_intermediate_size, got true",
    )
    require(
        tp == 1 or p.engine == "megatron",
        f"parallel.tensor_model_parallel_size: expected 1 with model.num_moe_experts under DeepSpeed, got {tp}: ranks "
        "would see different tokens of experts whose gradients nobody adds up; set parallel.engine=megatron",
    )
    require(
        tp == 1 or p.sequence_parallel,
        "parallel.sequence_parallel: expected true with model.num_moe_experts and tensor parallelism, got false",
    )
    require(
        tp == 1 or (ep > 1 and (ep % tp == 0 or tp % ep == 0)),
        f"parallel.expert_model_parallel_size: expected more than 1, and a multiple or a divisor of "
        f"tensor_model_parallel_size ({tp}), got {ep}; Megatron does not add up the gradients of copies of an expert "
        "on tensor-parallel ranks",
    )


def _check_deepspeed(config: RunConfig) -> None:
    p = config.parallel
    virtual = p.virtual_pipeline_model_parallel_size
    for key, value, fits, shown in (
        ("pipeline_model_parallel_size", p.pipeline_model_parallel_size, p.pipeline_model_parallel_size == 1, "1"),
        ("virtual_pipeline_model_parallel_size", virtual, virtual is None, "null"),
        ("expert_model_parallel_size", p.expert_model_parallel_size, p.expert_model_parallel_size == 1, "1"),
        ("overlap_grad_reduce", p.overlap_grad_reduce, not p.overlap_grad_reduce, "false"),
        ("overlap_param_gather", p.overlap_param_gather, not p.overlap_param_gather, "false"),
    ):
        if not fits:
            raise ConfigError(
                f"parallel.{key}: expected {shown} with parallel.engine deepspeed, got {value}; "
                "set parallel.engine=megatron"
            )
    for key in MEGATRON_MUON:
        value, default = getattr(config.optimizer, key), getattr(OptimizerConfig, key)
        if value != default:
            raise ConfigError(
                f"optimizer.{key}: expected {default} with parallel.engine deepspeed, whose Muon has no such choice, "
                f"got {value}; set parallel.engine=megatron"
            )


# keys that say how Megatron's own Muon works
MEGATRON_MUON = (
    *("muon_nesterov", "muon_split_qkv", "muon_tp_mode", "muon_coefficient_type", "muon_num_ns_steps"),
    *("muon_scale_mode", "muon_extra_scale_factor", "muon_fp32_matmul_prec"),
)


def _check_megatron(config: RunConfig) -> None:
    p, o = config.parallel, config.optimizer
    if p.offload_optimizer != "none":
        raise ConfigError(
            "parallel.offload_optimizer: expected none with parallel.engine megatron, got "
            f"{p.offload_optimizer}; set parallel.engine=deepspeed"
        )
    if o.name == "muon" and p.use_distributed_optimizer and config.training.precision != "bf16":
        raise ConfigError(
            "parallel.use_distributed_optimizer: Megatron's layer-wise Muon takes training.precision bf16 alone, got "
            f"{config.training.precision}; set parallel.use_distributed_optimizer=false"
        )
    if keeps_second_moment(config):
        raise ConfigError(
            "selection.preconditioner.kind: adamw beside optimizer.name muon needs a second moment that only "
            "parallel.engine deepspeed keeps, got megatron; expected auto, sgd or muon"
        )
    if o.name == "sgd" and p.use_distributed_optimizer:
        raise ConfigError(
            "parallel.use_distributed_optimizer: Megatron's distributed optimizer takes AdamW alone, got sgd; set "
            "parallel.use_distributed_optimizer=false"
        )
    if o.name == "muon" and o.muon_split_qkv:
        _check_split(config)
    if p.overlap_param_gather and not (p.use_distributed_optimizer and p.overlap_grad_reduce):
        raise ConfigError(
            "parallel.overlap_param_gather: expected use_distributed_optimizer and overlap_grad_reduce beside it, got "
            f"{p.use_distributed_optimizer} and {p.overlap_grad_reduce}"
        )
    stages, virtual = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size
    if virtual is not None and (virtual < 2 or stages < 3):
        # at two stages both neighbours are the same rank: Megatron itself refuses it without overlap_p2p_comm
        raise ConfigError(
            "parallel.virtual_pipeline_model_parallel_size: expected at least 2 pieces on each of at least 3 stages, "
            f"got {virtual} on {stages}; set it to null"
        )
    pieces = stages * (virtual or 1)
    if config.model.num_layers % pieces:
        raise ConfigError(
            f"model.num_layers: expected a multiple of pipeline_model_parallel_size x "
            f"virtual_pipeline_model_parallel_size ({stages} x {virtual or 1}), got {config.model.num_layers}"
        )


def _check_split(config: RunConfig) -> None:
    """Refuse to score queries that are taller than wide and orthogonalised apart from keys and values.

    Their multiplier stands on the columns of a matrix whose other parts have theirs on the rows.
    """
    m, s = config.model, config.selection
    shards = config.parallel.tensor_model_parallel_size if config.optimizer.muon_tp_mode == "blockwise" else 1
    rows = m.num_attention_heads * head_channels(m) // shards
    if s.strategy == "opus" and s.preconditioner.kind in ("auto", "muon") and rows > m.hidden_size:
        raise ConfigError(
            f"optimizer.muon_split_qkv: expected at most hidden_size ({m.hidden_size}) rows of queries in one matrix, "
            f"got {rows}, which cannot be scored; set optimizer.muon_split_qkv=false, or "
            "selection.preconditioner.kind=sgd"
        )


def check_stages(config: RunConfig, dp_size: int) -> None:
    """Raise ConfigError when one data-parallel rank's micro-batches do not fill the interleaved schedule."""
    p, t = config.parallel, config.training
    micros = t.global_batch_size // (t.micro_batch_size * dp_size)
    if p.virtual_pipeline_model_parallel_size is not None and micros % p.pipeline_model_parallel_size:
        raise ConfigError(
            "training.global_batch_size: the interleaved schedule takes a multiple of pipeline_model_parallel_size "
            f"({p.pipeline_model_parallel_size}) micro-batches on each data-parallel rank, got {micros}; raise it, or "
            "lower training.micro_batch_size"
        )
