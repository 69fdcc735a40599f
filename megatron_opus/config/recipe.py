"""Run configuration: frozen keyword-only dataclasses, YAML in, precise errors out.

A recipe is one YAML file whose sections are the dataclasses below. `include: models/gpt2_xl.yaml` (relative to the
recipe) is merged first, then the recipe's own keys, then `key=value` overrides with dotted paths. Every key is checked:
an unknown one is an error that names the nearest valid key, an ill-typed one says what was expected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_opus.config.strategies import AdoConfig, FilterThenWeightConfig, FloorsConfig, Strategy

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
    engine: Literal["deepspeed", "megatron"] = "deepspeed"  # who owns gradients and optimizer state
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1  # stages; more than 1 with engine megatron alone
    virtual_pipeline_model_parallel_size: int | None = None  # pieces of the model on each stage (interleaved schedule)
    sequence_parallel: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: Literal["none", "cpu"] = "none"  # where ZeRO keeps the optimizer state
    # engine megatron alone, names of Megatron's own arguments
    use_distributed_optimizer: bool = True  # optimizer state split over the data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass goes on
    overlap_param_gather: bool = False  # gather updated weights during the next forward pass
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
    # Where the alignment comes from. one_sided leaves to the features the redundancy alone, for which one sketch of all
    # layers will do, a fraction of the memory; which ranks better depends on the model (docs/performance.md).
    alignment: Literal["features", "one_sided", "direction"] = "one_sided"
    one_sided_dim: int = 64  # of the sketched side of each layer
    seed: int = 42
    scope: Literal["layer", "model"] = "model"


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    strategy: Strategy = "opus"
    scope: Literal["global", "rank_local"] = "global"  # rank_local: each data-parallel rank selects among its own
    rho: float = 0.5  # K / N: each step offers N = global_batch_size / rho candidates
    sampling: Literal["boltzmann", "greedy"] = "boltzmann"
    temperature: float = 0.3
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


# --- constraints -------------------------------------------------------------------------------------------------


def keeps_second_moment(config: RunConfig) -> bool:
    """Scoring in AdamW's geometry a run whose matrices Muon updates: the selector keeps a second moment itself."""
    s = config.selection
    return config.optimizer.name == "muon" and s.strategy == "opus" and s.preconditioner.kind == "adamw"
