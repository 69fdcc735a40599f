"""Estimate the bytes that one rank of every pipeline stage needs, by arithmetic on the recipe. Nothing is allocated.

Weights, gradients and optimizer state: states.py. Activations and logits: activations.py, as many micro-batches of them
as the schedule keeps: schedule.py. A stage's scoring reads the scored matrices that it holds, in the same schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from megatron_opus.config import ModelConfig, RunConfig
from megatron_opus.config.strategies import PERPLEXITY
from megatron_opus.estimates.activations import element, passing, saved
from megatron_opus.estimates.schedule import in_flight
from megatron_opus.estimates.states import state_bytes
from megatron_opus.layout.model_layout import ModelLayout, ParameterLayout, model_layout
from megatron_opus.layout.parallel_layout import ParallelLayout

GIB = 2**30
# What a process holds beside tensors once it runs: CUDA context, NCCL buffers and cuBLAS workspaces; on a CPU little,
# since interpreter and libraries are already counted as used when memory is looked up.
OVERHEAD = {"cuda": 2.0 * GIB, "cpu": 0.15 * GIB}
# Fragmentation and what the arithmetic leaves out. Measured on a CPU, seven recipes of 1 to 4 GiB (GPT-2 shapes and
# SwiGLU/RMSNorm/rotary ones, fp32 and bf16, ZeRO 0 to 2): peak resident memory was 0.86 to 0.98 of the estimate.
SLACK = 1.1
PARTS = (
    *("weights", "optimizer", "sketches", "gradients_kept", "overhead"),
    *("startup", "training", "step", "scoring"),
)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Holds bytes per rank of one stage. The phases take turns: the need is what stays and the largest of them."""

    stage: str  # which one, for the terminal; "" where the model is not cut into stages
    weights: float
    optimizer: float
    sketches: float  # projections of the scored matrices, the proxy's gradient, multipliers
    gradients_kept: float  # buffers that live between steps
    overhead: float
    startup: float  # before the weights are cut (ZeRO 3), or while they move into a buffer (Megatron)
    training: float  # gradients, activations and logits of the micro-batches in flight
    step: float  # gradients and the optimizer's temporaries
    scoring: float  # activations, factors, logits and features

    @property
    def total(self) -> float:
        stays = self.weights + self.optimizer + self.sketches + self.gradients_kept
        return SLACK * (stays + max(self.startup, self.training, self.step, self.scoring)) + self.overhead

    def lines(self) -> list[str]:
        """Write one line per part, in GiB."""
        return [f"  {name:15} {getattr(self, name) / GIB:8.2f} GiB" for name in PARTS] + [
            f"  {'total':15} {self.total / GIB:8.2f} GiB: what stays, the largest of startup to scoring, 10% slack"
        ]


def estimate(config: RunConfig, layout: ParallelLayout, *, device: str) -> MemoryEstimate:
    """Estimate the fullest stage of this recipe in this layout on "cpu" or "cuda" (see `stage_estimates`)."""
    return max(stage_estimates(config, layout, device=device), key=lambda x: x.total)


def stage_estimates(config: RunConfig, layout: ParallelLayout, *, device: str) -> list[MemoryEstimate]:
    """Estimate a rank of every stage, in order, on "cpu" or "cuda". `config.model.vocab_size` must be known.

    Raises ConfigError when the layers do not divide by stages and pieces.
    """
    parts = (config.model, layout.tp, layout.ep, config.data.seq_length, layout.pp, layout.pieces)
    return [_of_stage(config, model, layout, number, device) for number, model in enumerate(_stages(*parts))]


@cache
def _stages(model: ModelConfig, tp: int, ep: int, positions: int, pp: int, pieces: int) -> list[ModelLayout]:
    whole = model_layout(model, tp_size=tp, ep_size=ep, positions=positions)
    return [whole.stage(number, pp, pieces) for number in range(pp)]


def _of_stage(
    config: RunConfig, model: ModelLayout, layout: ParallelLayout, number: int, device: str
) -> MemoryEstimate:
    t = config.training
    state = state_bytes(config, model, layout, device)
    tokens = layout.micro_batch_size * config.data.seq_length / layout.cp
    kept = in_flight(layout, number, t.global_batch_size // (layout.micro_batch_size * layout.dp))
    forward = saved(config, len(model.blocks), layout, tokens, frozen=False, kept=kept)
    forward += passing(config, model, layout, tokens, frozen=False)
    matrices, sketches = _scored(config, model, layout), 0.0
    if config.selection.scores_gradients:
        sketches = _sketches(config, [m[:2] for m in matrices]) + _multipliers(config, model, layout)
    return MemoryEstimate(
        stage=_named(model, number, layout),
        weights=state.weights,
        optimizer=state.optimizer,
        gradients_kept=state.kept,
        sketches=sketches,
        overhead=OVERHEAD[device],
        startup=state.startup,
        training=state.gathered + state.gradients + forward,
        step=state.step,
        scoring=state.gathered + _scoring(config, model, matrices, layout, number),
    )


def _named(model: ModelLayout, number: int, layout: ParallelLayout) -> str:
    """Name a stage by what it holds: `pipeline stage 1 of 2 (layers 18 to 35, output layer)`."""
    if layout.pp == 1:
        return ""
    numbers = model.blocks
    runs = [i for i in numbers if i - 1 not in numbers], [i for i in numbers if i + 1 not in numbers]
    held = ["layers " + ", ".join(f"{i} to {j}" if i < j else str(i) for i, j in zip(*runs, strict=True))]
    held += ["embedding"] if number == 0 else []
    if model.gives_logits:
        tied = model.output.kind == "embedding"
        held.append("output layer" + (" (a copy of the embedding)" if tied else ""))
    return f"pipeline stage {number} of {layout.pp} ({', '.join(held)})"


def _scored(config: RunConfig, model: ModelLayout, layout: ParallelLayout) -> list[tuple[int, int, float]]:
    """List rows and columns of this rank's scored matrices, and the tokens each sees for one of a sequence here."""
    held = {p.name for p in model.held_by(0)}

    def seen(p: ParameterLayout) -> float:
        return 1.0 if p.expert is None else p.taken * layout.ep

    mine = [p for p in model.scored(config.selection) if p.name in held]
    shapes = [model.local_shape(p.name) for p in mine]
    return [(rows, columns, seen(p)) for p, (rows, columns) in zip(mine, shapes, strict=True)]


def _sketches(config: RunConfig, matrices: list[tuple[int, int]]) -> float:
    """Count the bytes of the scored matrices' projections, and of the proxy's gradient as the alignment needs it.

    A CPU keeps a bucket and a sign of each row and column, an accelerator matrices as wide as the sketched side; a
    composed copy of either is made when the preconditioner is read.
    """
    k = config.selection.sketch
    total = 0.0
    if k.operator in ("two_sided", "two_stage"):
        side = math.sqrt(k.dim if k.operator == "two_sided" else k.intermediate_dim)
        total += sum(8.0 * side * (rows + columns) for rows, columns in matrices)
    else:
        total += sum(24.0 * (rows + columns) for rows, columns in matrices)
    halves = 1 + config.selection.controller.enabled  # the whole proxy's, and those of one half
    if k.alignment == "one_sided":
        # the sketched side; then the gradient with the other side, before and after its preconditioner
        total += sum(4.0 * halves * k.one_sided_dim * (2 * rows + 2 * columns) for rows, columns in matrices)
        if config.selection.proxy_momentum:  # its average, and the average's new value beside it
            total += sum(4.0 * k.one_sided_dim * (rows + columns) for rows, columns in matrices)
    if k.alignment == "direction":
        total += sum(8.0 * halves * rows * columns for rows, columns in matrices)
    if config.selection.preconditioner.form == "exact":
        total += max((12.0 * rows * columns for rows, columns in matrices), default=0.0)
    return total


def _multipliers(config: RunConfig, model: ModelLayout, layout: ParallelLayout) -> float:
    """Count the bytes of Muon's frozen multipliers of the matrices that this rank owns, and the temporaries of one."""
    o = config.optimizer
    if o.name != "muon" or config.selection.preconditioner.kind not in ("auto", "muon"):
        return 0.0
    whole = layout.engine == "megatron" and o.muon_tp_mode != "blockwise"  # of all tensor-parallel ranks
    held = {p.name for p in model.held_by(0)}
    scored = [p for p in model.scored(config.selection) if p.name in held]
    shapes = [p.shape if whole else model.local_shape(p.name) for p in scored]
    total = sum(4.0 * min(shape) ** 2 for shape in shapes) / layout.dp
    return total + max((16.0 * min(shape) ** 2 + 8.0 * math.prod(shape) for shape in shapes), default=0.0)


def _scoring(
    config: RunConfig,
    model: ModelLayout,
    matrices: list[tuple[int, int, float]],
    layout: ParallelLayout,
    number: int,
) -> float:
    """Count the bytes of the scoring micro-batches in flight and of the features of all candidates."""
    s, k = config.selection, config.selection.sketch
    length = min(s.score_length, config.data.seq_length) / layout.cp
    share = -(-config.buffer_size // layout.dp)
    if not s.scores_gradients:  # at most losses: one layer's activations and the logits
        batch = min(s.score_micro_batch_size or share, share) if s.strategy in PERPLEXITY else 0
        return passing(config, model, layout, batch * length, frozen=True)
    largest = max(share, -(-s.proxy_batch_size // layout.dp))
    batch = min(s.score_micro_batch_size or largest, largest)
    kept = in_flight(layout, number, -(-largest // batch) * s.score_windows)
    e = element(config)
    columns = sum(columns * seen for _, columns, seen in matrices)
    with_features = k.alignment == "features" or s.redundancy.scale != "off"
    held = factors = 0.0
    if with_features:
        features = k.dim * (len(matrices) if k.scope == "layer" else 1)
        # sums, and float64 copies for an alignment of features; all ranks' features for the Gram matrix
        held = (16.0 if k.alignment == "features" else 4.0) * share * features
        held += 4.0 * config.buffer_size * features if layout.dp > 1 and s.redundancy.scale != "off" else 0.0
        if k.operator in ("two_sided", "two_stage"):
            side = math.sqrt(k.dim if k.operator == "two_sided" else k.intermediate_dim)
            factors += e * batch * length * side * sum(seen for _, _, seen in matrices)
        else:
            # the inputs themselves are kept until their gradient comes
            factors += e * batch * length * columns
            held += 2 * 64 * 2**20
    if k.alignment == "one_sided":
        factors += e * batch * length * k.one_sided_dim * sum(seen for _, _, seen in matrices)
    if k.alignment == "direction":
        factors += e * batch * length * columns
    activations = saved(config, len(model.blocks), layout, batch * length, frozen=True, kept=kept)
    return held + kept * factors + activations + passing(config, model, layout, batch * length, frozen=True)
