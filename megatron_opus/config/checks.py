"""Constraints between the values of a recipe: what cannot run is refused before anything is allocated."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from megatron_opus.config.schema import ConfigError, build
from megatron_opus.config.strategies import check_floors, check_strategy

if TYPE_CHECKING:
    from megatron_opus.config.recipe import RunConfig, SelectionConfig


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
    for name, value in (
        ("model.num_layers", m.num_layers),
        ("model.hidden_size", m.hidden_size),
        ("model.num_attention_heads", m.num_attention_heads),
        ("model.make_vocab_size_divisible_by", m.make_vocab_size_divisible_by),
        ("data.seq_length", d.seq_length),
        ("parallel.tensor_model_parallel_size", p.tensor_model_parallel_size),
        ("training.micro_batch_size", t.micro_batch_size),
        ("training.global_batch_size", t.global_batch_size),
        ("training.train_steps", t.train_steps),
        ("training.eval_sequences", t.eval_sequences),
        ("training.log_interval", t.log_interval),
        ("training.keep_checkpoints", t.keep_checkpoints),
    ):
        _require(value is None or value > 0, f"{name}: expected a positive number, got {value}")
    _require(
        bool(re.fullmatch(r"[A-Za-z0-9._-]+", config.name)),
        f"name: expected letters, digits, . _ -, got {config.name!r}",
    )
    _require(
        m.kv_channels is not None or m.hidden_size % m.num_attention_heads == 0,
        f"model.hidden_size: expected a multiple of num_attention_heads ({m.num_attention_heads}), got {m.hidden_size}",
    )
    groups = m.num_query_groups or m.num_attention_heads
    _require(
        m.num_attention_heads % groups == 0,
        f"model.num_query_groups: expected a divisor of num_attention_heads ({m.num_attention_heads}), got {groups}",
    )
    tp = p.tensor_model_parallel_size
    for name, value in (
        ("model.num_attention_heads", m.num_attention_heads),
        ("model.num_query_groups", groups),
        ("model.ffn_hidden_size", m.ffn_hidden_size or 4 * m.hidden_size),
        ("model.make_vocab_size_divisible_by", m.make_vocab_size_divisible_by),
    ):
        _require(value % tp == 0, f"{name}: expected a multiple of tensor_model_parallel_size ({tp}), got {value}")
    _require(
        p.pipeline_model_parallel_size == 1,
        "parallel.pipeline_model_parallel_size: only 1 is supported by this version, "
        f"got {p.pipeline_model_parallel_size}; raise tensor_model_parallel_size instead",
    )
    positions = m.max_position_embeddings
    _require(
        m.position_embedding_type != "learned_absolute" or positions is None or positions >= d.seq_length,
        f"model.max_position_embeddings: expected at least data.seq_length ({d.seq_length}), got {positions}",
    )
    _require(
        t.exit_duration_minutes is None or t.exit_duration_minutes > 0,
        f"training.exit_duration_minutes: expected more than 0, or null for no limit, got {t.exit_duration_minutes}",
    )
    _require(
        p.distributed_timeout_minutes > 0,
        f"parallel.distributed_timeout_minutes: expected more than 0, got {p.distributed_timeout_minutes}",
    )
    _require(0 < s.rho <= 1, f"selection.rho: expected 0 < rho <= 1, got {s.rho}")
    offered = t.global_batch_size / s.rho
    _require(
        abs(offered - round(offered)) < 1e-6,
        f"selection.rho: expected training.global_batch_size / rho to be whole, got {offered:g}",
    )
    _require(
        s.temperature > 0, f"selection.temperature: expected > 0, got {s.temperature}; for argmax use sampling: greedy"
    )
    _check_numbers(s)
    validate_estimator(s)
    _require(s.redundancy.fraction >= 0, f"selection.redundancy.fraction: expected >= 0, got {s.redundancy.fraction}")
    check_strategy(s, t.global_batch_size)
    _require(o.lr > 0 and 0 <= o.min_lr <= o.lr, f"optimizer.lr: expected 0 <= min_lr <= lr, got {o.min_lr}, {o.lr}")
    _require(
        o.lr_warmup_fraction is None or (o.lr_warmup_steps == 0 and 0 <= o.lr_warmup_fraction < 1),
        "optimizer.lr_warmup_fraction: expected 0 <= fraction < 1, and lr_warmup_steps 0 beside it, got "
        f"{o.lr_warmup_fraction} and {o.lr_warmup_steps}",
    )
    for name, beta in (
        ("adam_beta1", o.adam_beta1),
        ("adam_beta2", o.adam_beta2),
        ("muon_momentum", o.muon_momentum),
        ("sgd_momentum", o.sgd_momentum),
    ):
        _require(0 <= beta < 1, f"optimizer.{name}: expected 0 <= beta < 1, got {beta}")
    _require(o.muon_lr > 0, f"optimizer.muon_lr: expected > 0, got {o.muon_lr}")
    for name, decay in (("weight_decay", o.weight_decay), ("muon_weight_decay", o.muon_weight_decay)):
        _require(decay >= 0, f"optimizer.{name}: expected >= 0, got {decay}")
    _require(
        p.offload_optimizer == "none" or p.zero_stage > 0,
        "parallel.offload_optimizer: expected none at zero_stage 0, which keeps no partition that could lie elsewhere, "
        f"got {p.offload_optimizer}; set parallel.zero_stage=1 or higher",
    )
    kind = s.preconditioner.kind
    _require(
        kind in ("auto", "sgd", o.name) or (kind == "adamw" and o.name == "muon"),
        f"selection.preconditioner.kind: {kind} needs state that optimizer.name {o.name} does not keep; expected "
        f"{', '.join(dict.fromkeys(['auto', 'sgd', o.name, *(['adamw'] if o.name == 'muon' else [])]))}",
    )
    if d.domain_weights is not None:
        _require(
            all(w >= 0 for w in d.domain_weights.values()) and sum(d.domain_weights.values()) > 0,
            f"data.domain_weights: expected non-negative numbers with a positive sum, got {d.domain_weights}",
        )


def validate_scoring(s: SelectionConfig) -> None:
    """Raise ConfigError for a selection that a scoring pass cannot carry out: types, numbers and combinations.

    For configurations made in Python, whose fields nobody has checked.
    """
    build(type(s), dataclasses.asdict(s), "selection.")
    _check_numbers(s)
    validate_estimator(s)


def _check_numbers(s: SelectionConfig) -> None:
    muon_steps, micro_batch = s.preconditioner.muon_steps, s.score_micro_batch_size
    for name, value in (
        ("score_length", s.score_length),
        ("score_windows", s.score_windows),
        ("score_micro_batch_size", 1 if micro_batch is None else micro_batch),
        ("proxy_batch_size", s.proxy_batch_size),
        ("proxy_refresh_every", s.proxy_refresh_every),
        ("preconditioner.refresh_every", s.preconditioner.refresh_every),
        ("preconditioner.muon_steps", 1 if muon_steps is None else muon_steps),
        ("sketch.dim", s.sketch.dim),
        ("sketch.one_sided_dim", s.sketch.one_sided_dim),
    ):
        _require(value > 0, f"selection.{name}: expected a positive number, got {value}")
    _require(0 <= s.proxy_momentum < 1, f"selection.proxy_momentum: expected 0 <= beta < 1, got {s.proxy_momentum}")


def validate_estimator(s: SelectionConfig) -> None:
    """Raise ConfigError for estimators that cannot give what the rest of the selection asks of them."""
    k = s.sketch
    direct, features = k.alignment != "features", k.alignment == "features" or s.redundancy.scale != "off"
    if s.preconditioner.form == "exact":
        _require(
            not features or k.operator == "materialise",
            "selection.sketch.operator: preconditioner.form exact needs materialise (only it forms the full gradient), "
            f"got {k.operator}; or alignment=direction with redundancy.scale=off",
        )
        _require(
            k.alignment != "one_sided",
            "selection.sketch.alignment: preconditioner.form exact cannot be applied to a one-sided sketch; expected "
            "features (with operator materialise) or direction, got one_sided",
        )
    _require(
        k.operator != "two_stage" or k.intermediate_dim >= k.dim,
        f"selection.sketch.intermediate_dim: expected at least dim ({k.dim}), got {k.intermediate_dim}",
    )
    _require(
        not (s.score_embedding and features) or k.operator in ("two_sided", "two_stage"),
        "selection.sketch.operator: an embedding's one-hot rows need two_sided or two_stage (the others would form "
        f"them), got {k.operator}; or set selection.score_embedding=false",
    )
    _require(
        s.proxy_momentum == 0 or not direct,
        "selection.proxy_momentum: an average needs the proxy in sketch space; expected sketch.alignment=features, got "
        f"{k.alignment}",
    )
    _require(
        bool(re.fullmatch(r"all|(last|every):[1-9]\d*", s.scored_layers)),
        f"selection.scored_layers: expected all, last:K or every:K, got {s.scored_layers!r}",
    )


def validate_world(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError when `world_size` processes cannot be laid out as the recipe asks."""
    p, o, t = config.parallel, config.optimizer, config.training
    tp = p.tensor_model_parallel_size
    _require(
        world_size % tp == 0,
        f"parallel.tensor_model_parallel_size: {tp} does not divide the {world_size} processes started; "
        f"start a multiple of {tp} (deepspeed --num_gpus {tp}) or set parallel.tensor_model_parallel_size=1",
    )
    dp = world_size // tp
    for name, value, unit in (
        ("training.global_batch_size", t.global_batch_size, dp * t.micro_batch_size),
        ("training.global_batch_size / selection.rho", config.buffer_size, dp),
    ):
        what = f"data-parallel size {dp}" + (f" x micro_batch_size {t.micro_batch_size}" if unit != dp else "")
        _require(value % unit == 0, f"{name}: expected a multiple of {unit} ({what}), got {value}")
    if config.selection.scope == "rank_local":
        check_floors(config.selection.floors, t.global_batch_size // dp)

    _require(
        o.name != "muon" or tp == 1 or p.zero_stage != 1 or not accumulates_in_fp32(config, dp),
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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
