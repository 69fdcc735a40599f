"""Run configuration: frozen keyword-only dataclasses, YAML in, precise errors out.

A recipe is one YAML file whose sections are the dataclasses below. What it includes (`include: models/gpt2_xl.yaml`,
relative to the recipe) is merged first, then the recipe's own keys, then `key=value` overrides with dotted paths. Every
key is checked: an unknown one is an error that names the nearest valid key, an ill-typed one says what was expected.

The comment beside or above a field is its row in docs/config.md (`python tests/support/config_page.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_opus.config.data import DataConfig, Tokens
from megatron_opus.config.schema import Matches, Section, above, at_least, positive, require, within
from megatron_opus.config.strategies import (
    GHOST,
    PERPLEXITY,
    AdoConfig,
    ControllerConfig,
    DomainBanditConfig,
    FilterThenWeightConfig,
    FloorsConfig,
    PrefilterConfig,
    RedundancyConfig,
    Sequences,
    Steps,
    Strategy,
)

Geometry = Literal["auto", "adamw", "muon", "sgd"]

Heads = Annotated[int, positive(10_000)]
Width = Annotated[int, positive(10**6)]
Interval = Annotated[int, at_least(0, 10**9)]
Seed = Annotated[int, at_least(0, 2**31 - 1)]
Minutes = Annotated[float, above(0, 10**6)]  # about two years
Beta = Annotated[float, within("0 <= beta < 1")]
Dropout = Annotated[float, within("0 <= probability < 1")]
Epsilon = Annotated[float, within("0 < epsilon <= 1")]
Rate = Annotated[float, at_least(0, 1000)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, at="model"):
    """Shape of the GPT. Names are Megatron's `TransformerConfig` names."""

    num_layers: Annotated[int, positive(10_000)]  # Transformer blocks.
    hidden_size: Width  # Numbers per token between blocks.
    num_attention_heads: Heads  # Query heads per block; tensor parallelism divides them.
    # Key and value heads per block (grouped-query attention). null: as many as query heads.
    num_query_groups: Heads | None = None
    kv_channels: Width | None = None  # Numbers per head. null: hidden_size / num_attention_heads.
    ffn_hidden_size: Annotated[int, positive(10**7)] | None = None  # Width of the MLP. null: 4 x hidden_size.
    # Rows of the embedding. null: the tokenizer's ids; set it where released weights have more rows.
    vocab_size: Annotated[int, positive(10**8)] | None = None
    # The embedding is filled up to a multiple of this, the same at every tensor-parallel degree, so that weights are
    # comparable.
    make_vocab_size_divisible_by: Width = 128
    # Longest sequence that the position embedding has room for. null: data.seq_length.
    max_position_embeddings: Tokens | None = None
    # GPT-2 learns its positions, Qwen3 and Llama rotate by them (rope).
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    rotary_base: Annotated[int, positive(10**12)] = 10000  # Base of the rope frequencies; unused by learned_absolute.
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"  # GPT-2 has LayerNorm, Qwen3 and Llama RMSNorm.
    layernorm_epsilon: Epsilon = 1e-5  # Added to the variance under the root of either normalization.
    swiglu: bool = False  # The MLP is gated by SiLU, as in Qwen3 and Llama; false: GELU.
    add_bias_linear: bool = True  # Linear layers have biases.
    add_qkv_bias: bool = True  # The query, key and value projection has a bias.
    qk_layernorm: bool = False  # Queries and keys are normalized per head, as in Qwen3.
    untie_embeddings_and_output_weights: bool = False  # The output layer has a matrix of its own.
    # Experts in each block's MLP, of which every token takes moe_router_topk. null: one MLP.
    num_moe_experts: Annotated[int, within("2 <= experts <= 4096")] | None = None
    moe_router_topk: Annotated[int, positive(4096)] = 2  # Experts that each token is sent to.
    # Width of each expert. null: ffn_hidden_size.
    moe_ffn_hidden_size: Annotated[int, positive(10**7)] | None = None
    # Width of the experts that every token takes beside the chosen ones. null: none.
    moe_shared_expert_intermediate_size: Annotated[int, positive(10**7)] | None = None
    moe_shared_expert_gate: bool = False  # The shared experts' output is weighed by a gate, as in Qwen2-MoE.
    # Weight of the loss that balances the experts' load in training; it never enters a score.
    moe_aux_loss_coeff: Rate = 0.0
    hidden_dropout: Dropout = 0.0  # Dropout of what each block adds, in training.
    attention_dropout: Dropout = 0.0  # Dropout of attention weights, in training.
    # Standard deviation of random initial weights. Lower it for wide models.
    init_method_std: Annotated[float, within("0 <= std <= 10")] = 0.02
    # Which attention kernel runs: auto takes Transformer Engine on a GPU that has it, else PyTorch's sdpa.
    attention_backend: Literal["auto", "sdpa", "transformer_engine"] = "auto"
    # Weights to start from: a Hugging Face, converted or run directory. null: random weights.
    init_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section, at="parallel"):
    """How a run is spread over processes. What tensor and pipeline parallelism leave of them is data parallel."""

    # Who owns gradients and optimizer state: DeepSpeed with ZeRO, or Megatron's own data parallelism and optimizers.
    engine: Literal["deepspeed", "megatron"] = "deepspeed"
    # Processes that share each matrix. Raise it where one GPU cannot hold a sequence's activations.
    tensor_model_parallel_size: Annotated[int, positive(1024)] = 1
    # Stages of layers that follow each other on different processes; more than 1 with engine megatron alone.
    pipeline_model_parallel_size: Annotated[int, positive(1024)] = 1
    # Pieces of the model on each pipeline stage (interleaved schedule). null: one piece.
    virtual_pipeline_model_parallel_size: Annotated[int, positive(1024)] | None = None
    # Ranks over which the experts of a layer lie, out of those that tensor and data parallelism have; engine megatron.
    expert_model_parallel_size: Annotated[int, positive(1024)] = 1
    # How tokens travel to experts on other ranks: each rank gets all of them, or those alone that it needs.
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "allgather"
    # Tensor-parallel ranks split the tokens between matrices: less memory for the same result.
    sequence_parallel: bool = False
    # What ZeRO splits over data-parallel ranks: 1 optimizer state, 2 gradients too, 3 weights too; 0: nothing.
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: Literal["none", "cpu"] = "none"  # Where ZeRO keeps the optimizer state; cpu: the host's memory.
    use_distributed_optimizer: bool = True  # Engine megatron: split the optimizer state over the data-parallel ranks.
    overlap_grad_reduce: bool = False  # Engine megatron: reduce gradients while the backward pass goes on.
    overlap_param_gather: bool = False  # Engine megatron: gather updated weights during the next forward pass.
    # Minutes that ranks wait for a lost or slow one before they end. Raise it for slow disks.
    distributed_timeout_minutes: Minutes = 10.0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section, at="optimizer"):
    """Linear warm-up and cosine decay of every rate together; the learning rate of step s (from 0) is always positive.

    `muon` is the hybrid of the paper: Muon for the matrices of the transformer blocks, AdamW for everything else.
    Megatron's own (engine megatron) takes learned position embeddings too.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"  # muon: Muon for the matrices of the blocks, AdamW for the rest.
    lr: Rate = 3e-4  # Largest learning rate of AdamW or SGD.
    muon_lr: Annotated[float, above(0, 1000)] = 1e-2  # Largest learning rate of Muon's matrices.
    muon_momentum: Beta = 0.95  # Momentum of Muon.
    sgd_momentum: Beta = 0.0  # Momentum of SGD.
    min_lr: Rate = 0.0  # Where the cosine ends, in the unit of lr; Muon's rate keeps its ratio to lr.
    lr_warmup_steps: Interval = 0  # Steps over which the rate rises from 0.
    # The warm-up as a share of the decay steps, instead of lr_warmup_steps. null: lr_warmup_steps says it.
    lr_warmup_fraction: Annotated[float, within("0 <= fraction < 1")] | None = None
    # Step at which the cosine ends. null: training.train_steps.
    lr_decay_steps: Steps | None = None
    adam_beta1: Beta = 0.9  # Decay of AdamW's mean of gradients per step.
    adam_beta2: Beta = 0.95  # Decay of AdamW's mean of squared gradients per step.
    adam_eps: Epsilon = 1e-8  # Added to the root of AdamW's second moment.
    weight_decay: Rate = 0.1  # Of AdamW's and SGD's matrices; norms and biases are never decayed.
    muon_weight_decay: Rate = 0.0  # Of Muon's matrices.
    muon_nesterov: bool = False  # Engine megatron: Nesterov momentum of Muon; DeepSpeed's always has it.
    # Engine megatron: queries, keys and values of one matrix are orthogonalised apart.
    muon_split_qkv: bool = True
    # Engine megatron: tensor-parallel ranks orthogonalise their shards (blockwise), or the whole matrix, each of them
    # (duplicated) or together (distributed).
    muon_tp_mode: Literal["blockwise", "duplicated", "distributed"] = "blockwise"
    # Engine megatron: coefficients of Muon's Newton-Schulz steps, by Megatron's name.
    muon_coefficient_type: Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"] = "quintic"
    muon_num_ns_steps: Annotated[int, positive(100)] = 5  # Engine megatron: Newton-Schulz steps of Muon.
    # Engine megatron: factor for a matrix of shape o x i: sqrt(max(o, i)), sqrt(o / i), or sqrt(max(1, o / i)).
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    muon_extra_scale_factor: Annotated[float, above(0, 1000)] = 1.0  # Engine megatron: a further factor of the update.
    # Engine megatron: precision of Newton-Schulz products; medium is bf16.
    muon_fp32_matmul_prec: Literal["highest", "high", "medium"] = "medium"

    def check_together(self) -> None:
        require(
            self.lr > 0 and self.min_lr <= self.lr,
            f"optimizer.lr: expected 0 <= min_lr <= lr, got {self.min_lr}, {self.lr}",
        )
        require(
            self.lr_warmup_fraction is None or self.lr_warmup_steps == 0,
            "optimizer.lr_warmup_fraction: expected 0 <= fraction < 1, and lr_warmup_steps 0 beside it, got "
            f"{self.lr_warmup_fraction} and {self.lr_warmup_steps}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section, at="training"):
    """Batches, length, precision, and what is written when."""

    micro_batch_size: Sequences = 1  # Sequences per forward pass on one rank. Raise it as far as memory allows.
    global_batch_size: Sequences = 16  # Sequences per optimizer step, over all ranks: the K of the method.
    train_steps: Steps = 1000  # Optimizer steps of the whole run.
    precision: Literal["fp32", "bf16"] = "fp32"  # Of weights and activations; bf16 keeps float32 optimizer state.
    # full: keep only each layer's input and compute the rest again in backward, a third more work for less memory.
    recompute: Literal["none", "full"] = "none"
    gradient_clipping: Annotated[float, at_least(0, 10**9)] = 1.0  # Largest norm of the whole gradient; 0: no limit.
    eval_interval: Interval = 100  # Steps between validations; 0: only at the end.
    eval_sequences: Annotated[int, positive(10**9)] = 32  # Validation sequences per domain.
    checkpoint_interval: Interval = 500  # Steps between checkpoints; 0: only at the end.
    keep_checkpoints: Annotated[int, positive(10**9)] = 2  # Newest checkpoints kept; older ones are deleted.
    log_interval: Steps = 1  # Steps between lines on the terminal; metrics.jsonl has every step.
    tensorboard: bool = True  # Write TensorBoard events beside metrics.jsonl.
    # Stop with a checkpoint after so many minutes, for queues with a limit. null: train to the last step.
    exit_duration_minutes: Minutes | None = None
    max_nonfinite_steps: Steps = 3  # Consecutive steps with a NaN or infinite loss before the run stops.


@dataclass(frozen=True, kw_only=True)
class PreconditionerConfig(Section, at="selection.preconditioner"):
    """The optimizer's geometry, in which gradients are compared."""

    # Whose geometry: auto is each weight's own optimizer; adamw under Muon keeps a second moment of its own.
    kind: Geometry = "auto"
    # AdamW's second moment as a product of rows and columns, or exact, which must form every gradient.
    form: Literal["separable", "exact"] = "separable"
    # Newton-Schulz steps of Muon's frozen multiplier. null: the optimizer's number; 1: the paper's.
    muon_steps: Annotated[int, positive(100)] | None = None
    refresh_every: Steps = 1  # Steps for which one reading of the optimizer state is used; a checkpoint ends them.


@dataclass(frozen=True, kw_only=True)
class SketchConfig(Section, at="selection.sketch"):
    """How per-sequence gradients are compressed before they are compared."""

    # How a gradient is hashed: both sides apart, once more (two_stage), or formed whole (materialise, the paper's).
    operator: Literal["two_sided", "two_stage", "materialise"] = "two_sided"
    dim: Annotated[int, positive(2**26)] = 8192  # Numbers per sketch (m). More are more exact and take more memory.
    # Numbers of two_stage's two-sided sketch that is hashed down to dim.
    intermediate_dim: Annotated[int, positive(2**28)] = 65536
    # Where the alignment comes from. one_sided leaves to the features the redundancy alone, for which one sketch of all
    # layers will do, a fraction of the memory; which ranks better depends on the model (docs/performance.md).
    alignment: Literal["features", "one_sided", "direction"] = "one_sided"
    one_sided_dim: Width = 64  # Numbers of the sketched side of each layer (one_sided only).
    seed: Seed = 42  # Of the hashes.
    scope: Literal["layer", "model"] = "model"  # One sketch per layer, or one of all layers, which takes less memory.


@dataclass(frozen=True, kw_only=True)
class SelectionConfig(Section, at="selection"):
    """How K of N candidates are chosen at every step."""

    strategy: Strategy = "opus"  # Who chooses (docs/strategies.md).
    # Who is compared with whom: all candidates, or those of each data-parallel rank apart (rank_local).
    scope: Literal["global", "rank_local"] = "global"
    # K / N: each step offers N = global_batch_size / rho candidates. Lower: more choice, more scoring.
    rho: Annotated[float, within("0 < rho <= 1")] = 0.5
    sampling: Literal["boltzmann", "greedy"] = "boltzmann"  # Draw by utility, or take the largest.
    # Of the Boltzmann draw: lower is nearer to greedy.
    temperature: Annotated[float, above(0, 10**9, "; for argmax use sampling: greedy")] = 0.3
    # What a temperature of 1 is: the utilities' spread (std, or mad, which outliers do not inflate), or 1 itself.
    temperature_unit: Literal["std", "mad", "absolute"] = "std"
    redundancy: RedundancyConfig = field(default_factory=RedundancyConfig)
    ado: AdoConfig = field(default_factory=AdoConfig)
    domain_bandit: DomainBanditConfig = field(default_factory=DomainBanditConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    prefilter: PrefilterConfig = field(default_factory=PrefilterConfig)
    filter_then_weight: FilterThenWeightConfig = field(default_factory=FilterThenWeightConfig)
    floors: FloorsConfig = field(default_factory=FloorsConfig)
    preconditioner: PreconditionerConfig = field(default_factory=PreconditionerConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)
    # Which blocks are scored: all, none (the output layer or the embedding alone), the last K, or every K-th.
    scored_layers: Annotated[str, Matches("all|none|(last|every):[1-9][0-9]{0,5}", "all, none, last:K or every:K")] = (
        "all"
    )
    score_output_layer: bool = False  # The output layer's weight is scored too.
    score_embedding: bool = False  # The token embedding's weight is scored too; tied: the same weight as the output's.
    score_length: Tokens = 512  # Tokens of each scoring window (L_score), at most data.seq_length.
    # Where windows lie: at the start, or at an offset per step that is the same on every rank.
    score_window: Literal["first", "random"] = "first"
    score_windows: Tokens = 1  # Windows per sequence, averaged.
    # Of the scoring pass; model: training.precision; fp8: Transformer Engine's layers alone, with score().
    score_precision: Literal["model", "bf16", "fp8"] = "model"
    # What candidates are aligned with: the proxy's gradient, or the update that it would make.
    target: Literal["gradient", "update"] = "gradient"
    # Sequences per scoring forward on one rank. null: all at once.
    score_micro_batch_size: Sequences | None = None
    proxy_batch_size: Sequences = 8  # Sequences of the target per step, over all ranks (K_p).
    proxy_refresh_every: Steps = 1  # Steps for which one proxy batch is used; a checkpoint ends them.
    # Of an exponential average of the sketched proxy gradient; 0: none. Not with sketch.alignment direction.
    proxy_momentum: Beta = 0.0
    max_fallbacks: Interval = 10  # Steps that may fall back to random selection before the run stops.
    debug_checks: bool = False  # Compare the drawn ids across ranks at every step.

    def check_together(self) -> None:
        sketch, exact = self.sketch, self.preconditioner.form == "exact"
        features = sketch.alignment == "features" or self.redundancy.scale != "off"
        require(
            not exact or not features or sketch.operator == "materialise",
            "selection.sketch.operator: preconditioner.form exact needs materialise (only it forms the full gradient), "
            f"got {sketch.operator}; or alignment=direction with redundancy.scale=off",
        )
        require(
            not exact or sketch.alignment != "one_sided",
            "selection.sketch.alignment: preconditioner.form exact cannot be applied to a one-sided sketch; expected "
            "features (with operator materialise) or direction, got one_sided",
        )
        require(
            sketch.operator != "two_stage" or sketch.intermediate_dim >= sketch.dim,
            f"selection.sketch.intermediate_dim: expected at least dim ({sketch.dim}), got {sketch.intermediate_dim}",
        )
        require(
            not (self.score_embedding and features) or sketch.operator != "materialise",
            "selection.sketch.operator: an embedding's one-hot rows need two_sided or two_stage (materialise would "
            "form them), got materialise; or set selection.score_embedding=false",
        )
        require(
            self.proxy_momentum == 0 or sketch.alignment != "direction",
            "selection.proxy_momentum: an average needs the proxy in sketch space; expected sketch.alignment one_sided "
            f"or features, got {sketch.alignment}",
        )
        require(
            self.scored_layers != "none" or self.score_output_layer or self.score_embedding,
            "selection.scored_layers: none leaves nothing to score; set score_output_layer=true, or choose all",
        )
        require(
            self.target == "gradient" or sketch.alignment != "features",
            "selection.target: update needs sketch.alignment one_sided or direction, got features",
        )
        require(
            self.score_precision != "fp8" or self.score_length % 16 == 0,
            f"selection.score_length: expected a multiple of 16 with score_precision fp8, got {self.score_length}",
        )
        require(
            self.strategy != "greats" or self.preconditioner.kind in ("auto", "sgd"),
            f"selection.preconditioner.kind: greats scores in SGD's geometry (auto or sgd), got "
            f"{self.preconditioner.kind}; for another geometry use strategy opus with sampling greedy",
        )
        require(
            self.strategy != "filter_then_weight" or self.redundancy.scale != "off",
            "selection.redundancy.scale: filter_then_weight needs the interaction matrix, which `off` leaves out; set "
            "matched (the scale itself is not used)",
        )
        require(
            self.strategy not in PERPLEXITY or (self.score_window, self.score_windows) == ("first", 1),
            f"selection.score_windows: {self.strategy} scores the first window only, got score_window "
            f"{self.score_window} and score_windows {self.score_windows}",
        )

    @property
    def scores_gradients(self) -> bool:
        """Whether some step of the run has a scoring pass with gradients."""
        return self.strategy in GHOST or self.domain_bandit.enabled


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """A whole recipe."""

    # Of the run and its folder: letters, digits, . _ - with neither . nor - in front.
    name: Annotated[
        str, Matches("[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", "letters, digits, . _ - (none of . - in front; at most 200)")
    ]
    output_dir: str = "runs"  # Where the run's folder is made, relative to the directory the command is typed in.
    seed: Seed = 42  # Of initial weights, data order and draws. Another seed is another run of the same experiment.
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

    @property
    def scored_length(self) -> int:
        """Tokens of a sequence that scoring reads: all windows of it. A proxy sequence has no more."""
        return min(self.selection.score_length, self.data.seq_length) * self.selection.score_windows

    @property
    def pool_size(self) -> int:
        """Sequences drawn per optimizer step, of which a prefilter leaves N."""
        return self.buffer_size * self.selection.prefilter.pool_ratio


def keeps_second_moment(config: RunConfig) -> bool:
    """Scoring in AdamW's geometry a run whose matrices Muon updates: the selector keeps a second moment itself."""
    s = config.selection
    return config.optimizer.name == "muon" and s.strategy == "opus" and s.preconditioner.kind == "adamw"
