"""Estimate the bytes that one rank needs, by arithmetic on the recipe. Nothing is allocated.

P: parameters of this rank, D: data-parallel size, e: bytes of a weight (4, or 2 in bf16), s: numbers that the optimizer
keeps for each parameter (AdamW 2, Muon 1, SGD 1 with momentum and 0 without; one more where the selector keeps a second
moment for Muon's matrices).

                       weights  gradients             optimizer (masters and state)
ZeRO 0, fp32           4 P      4 P                   4 s P
ZeRO 0, bf16           2 P      2 P, 4 P in the step  4 (1 + s) P
ZeRO 1                 e P      e P                   4 (1 + s) P / D
ZeRO 1, bf16, accum.   2 P      2 P + 4 P             4 (1 + s) P / D
ZeRO 2                 e P      (e or 4) P / D        4 (1 + s) P / D  plus a bucket of gradients on their way
ZeRO 3                 e P / D  as ZeRO 2             4 (1 + s) P / D  plus gathered weights; e P while it starts

With Muon at ZeRO 1 and 2, a second copy of its momentum waits until the step is known to be good. An optimizer that is
offloaded from a GPU costs nothing there; whether the host can hold it is not looked into.

Activations are what autograd saves, per layer in elements of e bytes (Korthikanti et al. 2022, Table 2, without the
s x s terms): see `_saved_per_layer`. With recomputation: the input of every layer, and all of one layer at a time.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_opus.backends.engines.deepspeed.memory import gradient_bucket
from megatron_opus.config import RunConfig, keeps_second_moment
from megatron_opus.config.dimensions import ffn_size, head_channels, query_groups
from megatron_opus.config.strategies import PERPLEXITY
from megatron_opus.layout.model_layout import ModelLayout, recipe_layout
from megatron_opus.layout.parallel_layout import ParallelLayout

GIB = 2**30
# What a process holds beside tensors once it runs: CUDA context, NCCL buffers and cuBLAS workspaces; on a CPU little,
# since interpreter and libraries are already counted as used when memory is looked up.
OVERHEAD = {"cuda": 2.0 * GIB, "cpu": 0.15 * GIB}
# Fragmentation and what the arithmetic leaves out. Measured on a CPU, seven recipes of 1 to 4 GiB (GPT-2 shapes and
# SwiGLU/RMSNorm/rotary ones, fp32 and bf16, ZeRO 0 to 2): peak resident memory was 0.86 to 0.98 of the estimate.
SLACK = 1.1


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Holds bytes per rank. The phases take turns, so the need is what stays plus the largest of them."""

    weights: float
    optimizer: float
    sketches: float  # projections of the scored matrices, the proxy's gradient, multipliers
    gradients_kept: float  # buffers that live between steps
    overhead: float
    startup: float  # before the weights are cut (ZeRO 3)
    training: float  # gradients, activations and logits of one microbatch
    step: float  # gradients and the optimizer's temporaries
    scoring: float  # activations, factors, logits and features

    @property
    def total(self) -> float:
        stays = self.weights + self.optimizer + self.sketches + self.gradients_kept
        return SLACK * (stays + max(self.startup, self.training, self.step, self.scoring)) + self.overhead

    def lines(self) -> list[str]:
        """Write one line per part, in GiB."""
        return [f"  {f.name:15} {getattr(self, f.name) / GIB:8.2f} GiB" for f in dataclasses.fields(self)] + [
            f"  {'total':15} {self.total / GIB:8.2f} GiB: what stays, the largest of startup to scoring, 10% slack"
        ]


def estimate(config: RunConfig, layout: ParallelLayout, *, device: str) -> MemoryEstimate:
    """Estimate this recipe in this layout on "cpu" or "cuda". `config.model.vocab_size` must be known."""
    model = recipe_layout(config, layout.tp)
    t, dp = config.training, layout.dp
    bf16 = t.precision == "bf16"
    e = 2 if bf16 else 4
    p = model.local_size()
    accumulates = t.global_batch_size > layout.micro_batch_size * dp
    kept, startup, gathered = 0.0, 0.0, 0.0
    optimizer, temporaries = _optimizer(config, model, layout, device)
    if layout.zero_stage == 0:
        gradients = float(e * p)
        step = gradients + (4.0 * p if bf16 else 0.0)
    else:
        bucket = float(e * gradient_bucket(p))
        if layout.zero_stage == 1:
            gradients = float(e * p)
            kept = 4.0 * p if bf16 and accumulates else 0.0
        else:
            gradients = (4.0 if bf16 and accumulates else float(e)) * p / dp + 2 * bucket
        # this rank's part of the averaged gradients, and its float32 copy where it is not summed in float32 already
        step = 8.0 * p / dp
        if kept:
            step = gradients
        elif layout.zero_stage == 1:
            step += gradients
        elif bf16 and accumulates:
            step = 4.0 * p / dp
        if layout.zero_stage == 3:
            startup = float(e * p)  # the model is built whole and then cut
            gathered = bucket if dp > 1 else 0.0
    forward = _forward(config, model, layout, layout.micro_batch_size, config.data.seq_length, frozen=False)
    return MemoryEstimate(
        weights=float(e * p) / (dp if layout.zero_stage == 3 else 1),
        optimizer=optimizer,
        gradients_kept=kept,
        sketches=_sketches(config, model, layout) if config.selection.scores_gradients else 0.0,
        overhead=OVERHEAD[device],
        startup=startup,
        training=gathered + gradients + forward,
        step=step + temporaries,
        scoring=gathered + _scoring(config, model, layout),
    )


def _optimizer(config: RunConfig, model: ModelLayout, layout: ParallelLayout, device: str) -> tuple[float, float]:
    """Count the bytes of masters and state that stay, and of temporaries in the step, on the device."""
    o, dp, p = config.optimizer, layout.dp, model.local_size()
    largest = float(max(model.local_size([name]) for name in model.by_muon))
    by_muon = float(model.local_size(model.by_muon)) if o.name == "muon" else 0.0
    numbers = {"adamw": 2.0, "muon": 2.0, "sgd": float(o.sgd_momentum > 0)}[o.name] * (p - by_muon)
    numbers += by_muon * (2.0 if keeps_second_moment(config) else 1.0)
    offloaded = config.parallel.offload_optimizer == "cpu"
    if by_muon and layout.zero_stage in (1, 2) and not offloaded:
        # whole matrices, also those of which this rank owns a part, and the copy that awaits the end of the step
        numbers += by_muon + 4 * largest * dp
    if layout.zero_stage > 0 or config.training.precision == "bf16":
        numbers += p
    stays = 4.0 * numbers / (dp if layout.zero_stage > 0 else 1)
    temporaries = _step_temporaries(model, layout, device)
    if by_muon:
        temporaries += 16.0 * largest  # one matrix being orthogonalised
        if layout.zero_stage == 3:
            temporaries += 8.0 * min(by_muon, gradient_bucket(p))  # gradients and momenta gathered for it
    return (0.0 if offloaded and device == "cuda" else stays), temporaries


def _step_temporaries(model: ModelLayout, layout: ParallelLayout, device: str) -> float:
    """Count what the optimizer's step allocates: PyTorch's on a CPU make two tensors as large as the one they update.

    That is one parameter at stage 0, and the whole flat partition above. Fused kernels make none.
    """
    if device == "cuda":
        return 0.0
    if layout.zero_stage == 0:
        return 8.0 * max(model.local_size([p.name]) for p in model.parameters)
    return 8.0 * model.local_size() / layout.dp


def _saved_per_layer(config: RunConfig, layout: ParallelLayout, *, frozen: bool) -> float:
    """Count the elements per token that a layer keeps for its backward pass; `frozen`: without weight gradients."""
    m, tp = config.model, layout.tp
    h, f, c = m.hidden_size, ffn_size(m), head_channels(m)
    heads, groups = m.num_attention_heads, query_groups(m)
    bf16 = config.training.precision == "bf16"
    replicated = 2.0 * h  # inputs of the two norms
    if m.normalization == "RMSNorm" and not frozen:
        replicated += (6.0 if bf16 else 2.0) * h  # normalised inputs, in float32
    sharded = (2 * heads + 2 * groups) * c  # the fused projection, of which q, k, v are views, and the output
    if groups < heads:
        sharded += 2 * (heads - groups) * c  # keys and values repeated for each head
    if m.position_embedding_type == "rope":
        sharded += (heads + groups) * c  # rotated copies
    if m.qk_layernorm:
        sharded += (heads + groups) * c
    sharded += 4 * f if m.swiglu else f  # both halves before and after the activation; without gate, its input
    if not frozen:
        replicated += 2 * h  # inputs of the two column-parallel matrices
        sharded += f  # input of linear_fc2
    if m.hidden_dropout > 0:
        replicated += 2 * h
    if config.parallel.sequence_parallel and tp > 1:
        replicated = replicated / tp + h  # one gathered input at a time
    return replicated + sharded / tp


def _saved(config: RunConfig, layout: ParallelLayout, tokens: int, *, frozen: bool = True) -> float:
    """Count the bytes that all layers keep for a backward pass over so many tokens."""
    m, e = config.model, 2 if config.training.precision == "bf16" else 4
    layers, kept = float(m.num_layers), 0.0
    if config.training.recompute == "full" and not frozen:  # each layer's input, and all of one layer at a time
        layers = 1.0
        kept = m.num_layers * m.hidden_size / (layout.tp if config.parallel.sequence_parallel else 1)
    return (kept + layers * _saved_per_layer(config, layout, frozen=frozen)) * tokens * e


def _forward(
    config: RunConfig, model: ModelLayout, layout: ParallelLayout, batch: int, length: int, *, frozen: bool
) -> float:
    """Count the bytes of saved activations and of logits with their gradient for one forward and backward pass."""
    m = config.model
    e = 2 if config.training.precision == "bf16" else 4
    tokens = batch * length
    saved = _saved(config, layout, tokens, frozen=frozen)
    vocabulary, _ = model.local_shape(model.output.name)
    logits = tokens * vocabulary * (8.0 if e == 4 else 10.0)  # as computed, and the float32 softmax that is kept
    head_gradient = 0.0 if frozen else e * vocabulary * m.hidden_size  # of a tied weight, before it is added up
    widest = e * tokens * 4 * max(m.hidden_size, ffn_size(m) / layout.tp)  # in flight inside one layer
    return saved + max(logits + head_gradient, widest)


def _sketches(config: RunConfig, model: ModelLayout, layout: ParallelLayout) -> float:
    """Count the bytes of the scored matrices' projections, and of the proxy's gradient as the alignment needs it.

    A CPU keeps a bucket and a sign of each row and column, an accelerator matrices as wide as the sketched side; a
    composed copy of either is made when the preconditioner is read.
    """
    k = config.selection.sketch
    matrices = [model.local_shape(x.name) for x in model.scored(config.selection)]
    total = 0.0
    if k.operator in ("two_sided", "two_stage"):
        side = math.sqrt(k.dim if k.operator == "two_sided" else k.intermediate_dim)
        total += sum(8.0 * side * (rows + columns) for rows, columns in matrices)
    else:
        total += sum(24.0 * (rows + columns) for rows, columns in matrices)
    if k.alignment == "one_sided":
        # the sketched side; then the gradient with the other side, before and after its preconditioner
        total += sum(4.0 * k.one_sided_dim * (2 * rows + 2 * columns) for rows, columns in matrices)
        if config.selection.proxy_momentum:  # its average, and the average's new value beside it
            total += sum(4.0 * k.one_sided_dim * (rows + columns) for rows, columns in matrices)
    if k.alignment == "direction":
        total += sum(8.0 * rows * columns for rows, columns in matrices)
    if config.selection.preconditioner.form == "exact":
        total += max((12.0 * rows * columns for rows, columns in matrices), default=0.0)
    if config.optimizer.name == "muon" and config.selection.preconditioner.kind in ("auto", "muon"):
        # the frozen multipliers of the matrices that this rank owns, and the temporaries of one
        total += sum(4.0 * min(r, c) ** 2 for r, c in matrices) / layout.dp
        total += max((16.0 * min(r, c) ** 2 + 8.0 * r * c for r, c in matrices), default=0.0)
    return total


def _scoring(config: RunConfig, model: ModelLayout, layout: ParallelLayout) -> float:
    """Count the bytes of one scoring micro-batch and of the features of all candidates."""
    s, k = config.selection, config.selection.sketch
    length = min(s.score_length, config.data.seq_length)
    share = -(-config.buffer_size // layout.dp)
    if not s.scores_gradients:  # at most losses: one layer's activations and the logits
        batch = min(s.score_micro_batch_size or share, share) if s.strategy in PERPLEXITY else 0
        return _forward(config, model, layout, batch, length, frozen=True) - _saved(config, layout, batch * length)
    largest = max(share, -(-s.proxy_batch_size // layout.dp))
    batch = min(s.score_micro_batch_size or largest, largest)
    matrices = [model.local_shape(x.name) for x in model.scored(s)]
    e = 2 if config.training.precision == "bf16" else 4
    with_features = k.alignment == "features" or s.redundancy.scale != "off"
    held = factors = 0.0
    if with_features:
        features = k.dim * (len(matrices) if k.scope == "layer" else 1)
        # sums, and float64 copies for an alignment of features; all ranks' features for the Gram matrix
        held = (16.0 if k.alignment == "features" else 4.0) * share * features
        held += 4.0 * config.buffer_size * features if layout.dp > 1 and s.redundancy.scale != "off" else 0.0
        if k.operator in ("two_sided", "two_stage"):
            side = math.sqrt(k.dim if k.operator == "two_sided" else k.intermediate_dim)
            factors += e * batch * length * len(matrices) * side
        else:
            # the inputs themselves are kept until their gradient comes
            factors += e * batch * length * sum(columns for _, columns in matrices) + 2 * 64 * 2**20
    if k.alignment == "one_sided":
        factors += e * batch * length * len(matrices) * k.one_sided_dim
    if k.alignment == "direction":
        factors += e * batch * length * sum(columns for _, columns in matrices)
    return held + factors + _forward(config, model, layout, batch, length, frozen=True)
