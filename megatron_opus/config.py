"""Run configuration: frozen keyword-only dataclasses, YAML in, precise errors out.

A recipe is one YAML file whose sections are the dataclasses below. `include: models/gpt2_xl.yaml` (relative to the
recipe) is merged first, then the recipe's own keys, then `key=value` overrides with dotted paths. Every key is checked:
an unknown one is an error that names the nearest valid key, an ill-typed one says what was expected.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_opus import schema
from megatron_opus.schema import ConfigError
from megatron_opus.strategy_config import (
    AdoConfig,
    FilterThenWeightConfig,
    FloorsConfig,
    Strategy,
    check_floors,
    check_strategy,
)

Geometry = Literal["auto", "adamw", "muon", "sgd"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the GPT. Names are Megatron's `TransformerConfig` names."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None  # None: as many as attention heads (no grouped-query attention)
    kv_channels: int | None = None  # None: hidden_size / num_attention_heads
    ffn_hidden_size: int | None = None  # None: 4 * hidden_size
    vocab_size: int | None = None  # None: the tokenizer's
    make_vocab_size_divisible_by: int = 128  # the same at every tensor-parallel degree, so weights are comparable
    max_position_embeddings: int | None = None  # None: data.seq_length
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    rotary_base: int = 10000
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    swiglu: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = True
    qk_layernorm: bool = False
    untie_embeddings_and_output_weights: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    attention_backend: Literal["auto", "sdpa", "transformer_engine"] = "auto"
    init_from: str | None = None  # weights to start from: a Hugging Face, converted or run directory; None: random


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and how sequences are cut. `data=NAME` on the command line means `data.path=NAME`."""

    path: str = "embedded"  # "embedded", or a directory made by tools/prepare_data.py
    cache_dir: str = "data"  # where the embedded corpus is prepared
    seq_length: int = 1024  # tokens per sequence of the update (L_train)
    domain_weights: dict[str, float] | None = None  # None: proportional to tokens
    unselected: Literal["discard", "return"] = "discard"
    reset_attention_mask: bool = False  # True: no attention across document boundaries
    reset_position_ids: bool = False  # True: positions restart at each document
    eod_mask_loss: bool = False  # True: no loss on predicting the first token after an end-of-document


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: Literal["none", "cpu"] = "none"  # where ZeRO keeps the optimizer state
    distributed_timeout_minutes: float = 10.0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Linear warm-up and cosine decay of every rate together; the learning rate of step s (from 0) is always positive.

    `muon` is the hybrid of the paper: Muon for the matrices of the transformer blocks, AdamW for everything else.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: float = 3e-4
    muon_lr: float = 1e-2  # of the Muon matrices; follows the same schedule as lr
    muon_momentum: float = 0.95
    sgd_momentum: float = 0.0
    min_lr: float = 0.0
    lr_warmup_steps: int = 0
    lr_warmup_fraction: float | None = None  # of the decay steps; instead of lr_warmup_steps
    lr_decay_steps: int | None = None  # None: training.train_steps
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1  # AdamW's and SGD's, matrices only; norms and biases are never decayed
    muon_weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    micro_batch_size: int = 1
    global_batch_size: int = 16  # sequences per optimizer step: the K of the method
    train_steps: int = 1000
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "full"] = (
        "none"  # full: keep only each layer's input, compute the rest again in backward
    )
    gradient_clipping: float = 1.0
    eval_interval: int = 100  # steps; 0: only at the end
    eval_sequences: int = 32  # per validation domain
    checkpoint_interval: int = 500  # steps; 0: only at the end
    keep_checkpoints: int = 2
    log_interval: int = 1
    tensorboard: bool = True
    exit_duration_minutes: float | None = None  # stop with a checkpoint after so long; None: train to the last step
    max_nonfinite_steps: int = 3  # consecutive steps with a NaN/Inf loss before the run stops


@dataclass(frozen=True, kw_only=True)
class RedundancyConfig:
    scale: Literal["matched", "paper", "off"] = "matched"
    fraction: float = 0.1  # `matched`: mean |redundancy| of a half-filled batch / standard deviation of alignment


@dataclass(frozen=True, kw_only=True)
class PreconditionerConfig:
    kind: Geometry = "auto"  # auto: each weight's own optimizer; adamw under Muon keeps a second moment of its own
    form: Literal["separable", "exact"] = "separable"  # of AdamW's second moment
    muon_steps: int | None = None  # Newton-Schulz steps of the frozen multiplier; None: the optimizer's; 1: the paper's
    refresh_every: int = 1  # steps


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    operator: Literal["two_sided", "two_stage", "tensor_sketch", "materialise"] = "two_sided"
    dim: int = 8192
    intermediate_dim: int = 65536  # two_stage: numbers of the two-sided sketch that is hashed down to `dim`
    alignment: Literal["features", "one_sided", "direction"] = "features"  # where the alignment comes from
    one_sided_dim: int = 128  # of the sketched side of each layer
    seed: int = 42
    scope: Literal["layer", "model"] = "layer"


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    strategy: Strategy = "opus"
    scope: Literal["global", "rank_local"] = "global"  # rank_local: each data-parallel rank selects among its own
    rho: float = 0.5  # K / N: each step offers N = global_batch_size / rho candidates
    sampling: Literal["boltzmann", "greedy"] = "boltzmann"
    temperature: float = 0.9
    temperature_unit: Literal["std", "mad", "absolute"] = "std"  # mad: not inflated by outliers
    redundancy: RedundancyConfig = field(default_factory=RedundancyConfig)
    ado: AdoConfig = field(default_factory=AdoConfig)
    filter_then_weight: FilterThenWeightConfig = field(default_factory=FilterThenWeightConfig)
    floors: FloorsConfig = field(default_factory=FloorsConfig)
    preconditioner: PreconditionerConfig = field(default_factory=PreconditionerConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)
    layer_weights: Literal["none", "inverse_sqrt"] = "none"
    scored_layers: str = "all"  # all, last:K blocks, every:K blocks
    score_output_layer: bool = False  # the output layer's weight is scored too
    score_embedding: bool = False  # the token embedding's weight is scored too; tied: the same weight as the output's
    score_length: int = 512  # tokens of each scoring window (L_score)
    score_window: Literal["first", "random"] = "first"  # random: an offset per step, the same on every rank
    score_windows: int = 1  # windows per sequence, averaged
    score_precision: Literal["model", "bf16"] = "model"
    score_micro_batch_size: int | None = None  # sequences per scoring forward on one rank; None: all at once
    proxy_batch_size: int = 8  # K_p, over all ranks
    proxy_refresh_every: int = 1  # steps for which one proxy batch is used
    proxy_momentum: float = 0.0  # exponential average of the proxy sketch
    max_fallbacks: int = 10  # steps that may fall back to random selection before the run stops
    debug_checks: bool = False  # compare the drawn ids across ranks at every step


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str
    output_dir: str = "runs"
    seed: int = 42
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)

    @property
    def buffer_size(self) -> int:
        """N, candidates offered per optimizer step."""
        return round(self.training.global_batch_size / self.selection.rho)


# --- building from plain data --------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply `key=value` overrides, check every key and every cross-field constraint.

    Raises ConfigError naming the key, the expected and the found value.
    """
    raw = schema.read_yaml(Path(path))
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep or not key:
            raise ConfigError(f"override {override!r}: expected key=value, for example training.train_steps=100")
        try:
            parsed = yaml.load(value, schema.Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML ({error})") from error
        schema.assign(raw, key.split("."), parsed)
    return from_dict(raw)


def from_dict(raw: Mapping[str, Any]) -> RunConfig:
    """RunConfig from nested plain data, as YAML gives it. Raises ConfigError."""
    config = schema.build(RunConfig, raw)
    validate(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain data that `from_dict` turns back into an equal configuration."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


# --- constraints that need nothing but the configuration -----------------------------------------------------------


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
        ("selection.score_length", s.score_length),
        ("selection.proxy_batch_size", s.proxy_batch_size),
        ("selection.preconditioner.refresh_every", s.preconditioner.refresh_every),
        (
            "selection.preconditioner.muon_steps",
            1 if s.preconditioner.muon_steps is None else s.preconditioner.muon_steps,
        ),
        ("selection.sketch.dim", s.sketch.dim),
        ("selection.sketch.one_sided_dim", s.sketch.one_sided_dim),
        ("selection.score_windows", s.score_windows),
        ("selection.proxy_refresh_every", s.proxy_refresh_every),
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
    _require(0 <= s.proxy_momentum < 1, f"selection.proxy_momentum: expected 0 <= beta < 1, got {s.proxy_momentum}")
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


def keeps_second_moment(config: RunConfig) -> bool:
    """Scoring in AdamW's geometry a run whose matrices Muon updates: the selector keeps a second moment itself."""
    s = config.selection
    return config.optimizer.name == "muon" and s.strategy == "opus" and s.preconditioner.kind == "adamw"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
