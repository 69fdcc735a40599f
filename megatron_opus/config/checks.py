"""Constraints between the sections of a recipe: what cannot run is refused before anything is allocated."""

from __future__ import annotations

from megatron_opus.config.dimensions import query_groups, sizes_to_divide
from megatron_opus.config.engines import check_engine, check_stages
from megatron_opus.config.recipe import RunConfig, SelectionConfig
from megatron_opus.config.schema import require
from megatron_opus.config.strategies import GHOST, PERPLEXITY, check_floors

MOST_CANDIDATES = 10**6


def validate(config: RunConfig) -> None:
    """Raise ConfigError for the first combination of values that cannot run, whatever the machine."""
    m, d, p, o, t, s = (
        config.model,
        config.data,
        config.parallel,
        config.optimizer,
        config.training,
        config.selection,
    )
    require(
        m.kv_channels is not None or m.hidden_size % m.num_attention_heads == 0,
        f"model.hidden_size: expected a multiple of num_attention_heads ({m.num_attention_heads}), got {m.hidden_size}",
    )
    groups = query_groups(m)
    require(
        m.num_attention_heads % groups == 0,
        f"model.num_query_groups: expected a divisor of num_attention_heads ({m.num_attention_heads}), got {groups}",
    )
    channels = m.kv_channels or m.hidden_size // m.num_attention_heads
    require(
        m.position_embedding_type != "rope" or channels % 2 == 0,
        f"model.kv_channels: rope rotates pairs of numbers; expected an even number per head, got {channels}",
    )
    tp = p.tensor_model_parallel_size
    for name, value in sizes_to_divide(m).items():
        require(value % tp == 0, f"{name}: expected a multiple of tensor_model_parallel_size ({tp}), got {value}")
    window = min(s.score_length, d.seq_length)
    for name, value in (("data.seq_length", d.seq_length), ("selection.score_length", window)):
        require(
            not p.sequence_parallel or value % tp == 0,
            f"{name}: sequence_parallel splits it; expected a multiple of tensor_model_parallel_size ({tp}), got "
            f"{value}",
        )
    check_engine(config)
    positions = m.max_position_embeddings
    require(
        m.position_embedding_type != "learned_absolute" or positions is None or positions >= d.seq_length,
        f"model.max_position_embeddings: expected at least data.seq_length ({d.seq_length}), got {positions}",
    )
    require(
        s.score_windows <= d.seq_length // window,
        f"selection.score_windows: expected at most {d.seq_length // window} windows of {window} tokens in sequences "
        f"of {d.seq_length}, got {s.score_windows}; lower selection.score_length or selection.score_windows",
    )
    offered = t.global_batch_size / s.rho
    require(
        offered <= MOST_CANDIDATES,
        f"selection.rho: expected training.global_batch_size / rho of at most {MOST_CANDIDATES:,}, got {offered:g}",
    )
    require(
        abs(offered - round(offered)) < 1e-6,
        f"selection.rho: expected training.global_batch_size / rho to be whole, got {offered:g}",
    )
    check_floors(s.floors, t.global_batch_size)
    d.domain_schedule.resolved(t.train_steps)
    check_mechanisms(s)
    require(
        p.offload_optimizer == "none" or p.zero_stage > 0,
        "parallel.offload_optimizer: expected none at zero_stage 0, which keeps no partition that could lie elsewhere, "
        f"got {p.offload_optimizer}; set parallel.zero_stage=1 or higher",
    )
    kind = s.preconditioner.kind
    kinds = dict.fromkeys(["auto", "sgd", o.name, *(["adamw"] if o.name == "muon" else [])])
    require(
        kind in kinds,
        f"selection.preconditioner.kind: {kind} needs state that optimizer.name {o.name} does not keep; expected "
        f"{', '.join(kinds)}",
    )


def check_mechanisms(s: SelectionConfig) -> None:
    """Raise ConfigError where bandit, controller or prefilter lacks what it needs of the strategy."""
    bandit, prefilter = s.domain_bandit.enabled, s.prefilter.pool_ratio > 1
    scoring = ", ".join(GHOST)
    require(
        not bandit or (s.strategy != "ado" and not s.ado.enabled),
        "selection.domain_bandit: ADO decides the domain shares already; enable one of the two",
    )
    require(
        not bandit or s.strategy not in PERPLEXITY,
        f"selection.domain_bandit: {s.strategy} computes losses and no utilities; use random or one of {scoring}",
    )
    require(
        not s.controller.enabled or s.scores_gradients,
        f"selection.controller: {s.strategy} has no utilities that could pay; use one of {scoring}, or set "
        "selection.domain_bandit.enabled=true",
    )
    halved = s.proxy_batch_size > 1 and s.proxy_momentum == 0 and s.proxy_refresh_every == 1
    require(
        not s.controller.enabled or halved,
        "selection.controller: compares what two halves of every proxy batch say; expected proxy_batch_size of at "
        f"least 2, proxy_momentum 0 and proxy_refresh_every 1, got {s.proxy_batch_size}, {s.proxy_momentum:g} and "
        f"{s.proxy_refresh_every}",
    )
    require(
        not prefilter or s.scores_gradients,
        f"selection.prefilter: {s.strategy} scores nothing that a model could learn from; use one of {scoring}, or "
        "set selection.domain_bandit.enabled=true",
    )
    for name, on in (("domain_bandit", bandit), ("controller", s.controller.enabled), ("prefilter", prefilter)):
        require(
            not on or s.scope == "global",
            f"selection.{name}: needs the utilities of all candidates on every rank; expected scope global, got "
            f"{s.scope}",
        )


def validate_world(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError when `world_size` processes cannot be laid out as the recipe asks."""
    p, o, t = config.parallel, config.optimizer, config.training
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    require(
        pp > 1 or world_size % tp == 0,
        f"parallel.tensor_model_parallel_size: {tp} does not divide the {world_size} processes started; "
        f"start a multiple of {tp} (deepspeed --num_gpus {tp}) or set parallel.tensor_model_parallel_size=1",
    )
    require(
        world_size % (tp * pp) == 0,
        f"parallel: tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp} does not divide the "
        f"{world_size} processes started; start a multiple of {tp * pp} (torchrun --nproc-per-node {tp * pp})",
    )
    dp, ep = world_size // (tp * pp), p.expert_model_parallel_size
    require(
        (world_size // pp) % ep == 0,
        f"parallel.expert_model_parallel_size: expected a divisor of the {world_size // pp} processes of a pipeline "
        f"stage, got {ep}",
    )
    for name, value, unit in (
        ("training.global_batch_size", t.global_batch_size, dp * t.micro_batch_size),
        ("training.global_batch_size / selection.rho", config.buffer_size, dp),
    ):
        what = f"data-parallel size {dp}" + (f" x micro_batch_size {t.micro_batch_size}" if unit != dp else "")
        require(value % unit == 0, f"{name}: expected a multiple of {unit} ({what}), got {value}")
    check_stages(config, dp)
    if config.selection.scope == "rank_local":
        check_floors(config.selection.floors, t.global_batch_size // dp)
    require(
        p.engine == "megatron"
        or o.name != "muon"
        or tp == 1
        or p.zero_stage != 1
        or not accumulates_in_fp32(config, dp),
        "parallel.zero_stage: 1 with optimizer.name muon, bf16, accumulation steps and tensor parallelism is refused "
        "by DeepSpeed's BF16_Optimizer; set parallel.zero_stage=2, or raise micro_batch_size until one step has one "
        "microbatch",
    )


def accumulates_in_fp32(config: RunConfig, dp_size: int) -> bool:
    """bf16 microbatch gradients are summed in float32 under ZeRO: eight bits of mantissa lose small ones."""
    t = config.training
    return (
        t.precision == "bf16" and config.parallel.zero_stage > 0 and t.global_batch_size > t.micro_batch_size * dp_size
    )
