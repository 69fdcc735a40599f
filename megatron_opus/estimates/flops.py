"""Count the FLOPs of one optimizer step and of the selection in it from shapes. Nothing is run.

A multiply-add is two. All ranks together, T tokens in each of B sequences, matrices [O, I], h heads of c channels, V
rows of the padded vocabulary, s the one-sided dimension, w_O and w_I the widths of the two-sided sketch, F features:

    linear layers       forward 2 B T O I; gradient of the input as much, gradient of the weight as much; of experts,
                        topk of them
    output layer        the same with V x hidden, on the last pipeline stage
    attention           forward 4 B h c pairs; backward 10 B h c pairs: scores once more, and four products.
                        pairs: T (T + 1) / 2 as causal kernels compute them, T^2 as `dense` and torch's counter do
    scoring backward    gradients of inputs only, down to the lowest scored output: without the lowest scored
                        block's linear_qkv and without what lies below it
    sketch              candidates: 2 T (O w_O + I w_I + w_O w_I) features, 2 T (O + I + 1) s one_sided; the proxy's
                        gradient 2 T (O + I) s. `sums`: hashing a side of d costs 2 T d (on a CPU) instead of 2 T d w
    preconditioner      AdamW 2 O I for the sums of its second moment; Muon 2 k^2 l + 34 k^3 for the multiplier of a
                        k x l matrix (k the smaller side, five Newton-Schulz steps) and 2 k^2 for each projected column
    interaction         2 N^2 F, and 2 N K for the draws
    update              18 for each parameter of AdamW and of clipping; Muon 4 k^2 l + 34 k^3

Norms, activations, softmax and the loss are left out, as every such count does: a few percent of a small model's. The
tests compare the first four with torch's counter on the real model, and the sketch on the real scoring pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_opus.config import RunConfig, SelectionConfig, SketchConfig
from megatron_opus.layout.model_layout import ModelLayout, recipe_layout, scored_blocks
from megatron_opus.layout.parallel_layout import ParallelLayout
from megatron_opus.selection.sketch import two_sided_shape

Attention = Literal["causal", "dense"]
Projections = Literal["products", "sums"]  # how a bucket sketch is applied: on an accelerator, on a CPU
ELEMENTWISE_UPDATE = 18.0  # AdamW: 15 operations for each parameter, clipping 3
NEWTON_SCHULZ_STEPS = 5  # DeepSpeed's default


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Holds the FLOPs of one optimizer step, all ranks together; `update` and `selection` by part."""

    update: Mapping[str, float]
    selection: Mapping[str, float]

    @property
    def overhead(self) -> float:
        """Give (step with selection - step without) / step without."""
        return sum(self.selection.values()) / sum(self.update.values())

    @property
    def tax(self) -> float:
        """Give scoring / its forward and backward passes: the sketch tax in FLOPs."""
        passes = self.selection["forward"] + self.selection["backward"]
        return (passes + self.selection["sketch"] + self.selection["preconditioner"]) / passes


def step_flops(
    config: RunConfig, *, attention: Attention = "causal", projections: Projections = "products"
) -> StepFlops:
    """Count a recipe whose vocabulary is known (ConfigError otherwise), selected by a strategy that scores gradients.

    What is not done at every step (`proxy_refresh_every`, `preconditioner.refresh_every`) counts its share.
    """
    s, t, m = config.selection, config.training, recipe_layout(config, tp_size=1)
    length, n, k = config.data.seq_length, config.buffer_size, t.global_batch_size
    update = {
        "forward": k * forward(m, length, attention),
        "backward": k * backward(m, length, attention),
        "recompute": k * blocks_forward(m, length, attention) if t.recompute == "full" else 0.0,
        "optimizer": _update(config, m),
    }
    window = min(s.score_length, length)
    proxies = s.proxy_batch_size / s.proxy_refresh_every
    windows = s.score_windows * (n + proxies)
    candidate, proxy = sketch_flops(m, s, window, projections)
    wanted = s.redundancy.scale != "off"
    features = s.sketch.dim * (1 if s.sketch.scope == "model" else len(m.scored(s)))
    selection = {
        "forward": windows * forward(m, window, attention),
        "backward": windows * scoring_backward(m, s, window, attention),
        "sketch": s.score_windows * (n * candidate + proxies * proxy),
        "preconditioner": _preconditioner(config, m) / s.preconditioner.refresh_every,
        "interaction": 2.0 * n * n * features * wanted + 2.0 * n * k,
    }
    return StepFlops(update=update, selection=selection)


def stage_shares(config: RunConfig, layout: ParallelLayout, *, attention: Attention = "causal") -> list[float]:
    """Give the share of an update's forward and backward passes that each pipeline stage computes, in order.

    The vocabulary must be known. The output layer makes the last stage the busiest, since layers are shared equally.
    """
    whole, length = recipe_layout(config, tp_size=1), config.data.seq_length
    again = config.training.recompute == "full"

    def passes(m: ModelLayout) -> float:
        recomputed = blocks_forward(m, length, attention) if again else 0.0
        return forward(m, length, attention) + backward(m, length, attention) + recomputed

    stages = [whole.stage(number, layout.pp, layout.pieces) for number in range(layout.pp)]
    return [passes(m) / passes(whole) for m in stages]


# --- passes over one sequence ---------------------------------------------------------------------------------------


def forward(model: ModelLayout, length: int, attention: Attention) -> float:
    """Count one sequence through blocks and output layer; the embedding is a table look-up."""
    return blocks_forward(model, length, attention) + 2.0 * length * model.head_size


def backward(model: ModelLayout, length: int, attention: Attention) -> float:
    """Count the gradients of all weights and activations."""
    products = 2.0 * length * (sum(x.size * x.taken for x in model.linear) + model.head_size)
    return 2.0 * products + 2.5 * _attention(model, length, attention)


def blocks_forward(model: ModelLayout, length: int, attention: Attention) -> float:
    """Count one sequence through the blocks."""
    return 2.0 * length * sum(x.size * x.taken for x in model.linear) + _attention(model, length, attention)


def scoring_backward(model: ModelLayout, selection: SelectionConfig, length: int, attention: Attention) -> float:
    """Count the gradients of activations from the loss down to the lowest scored output, of one sequence."""
    blocks = model.all_blocks or model.blocks
    lowest = min(scored_blocks(blocks, selection.scored_layers), default=max(blocks) + 1)
    if selection.score_embedding:  # the gradient of the embedding's output lies below everything
        lowest = -1
    first = f"layers.{lowest}.self_attention.linear_qkv"
    reached = [x for x in model.linear if x.block is not None and x.block >= lowest]
    products = 2.0 * length * (sum(x.size * x.taken for x in reached if first not in x.name) + model.head_size)
    return products + 2.5 * _attention(model, length, attention, lowest)


def _attention(model: ModelLayout, length: int, attention: Attention, lowest: int = 0) -> float:
    """Count the forward pass of attention in the blocks from `lowest` on."""
    pairs = length * (length + 1) / 2 if attention == "causal" else float(length) ** 2
    heads_and_channels = (x.shape[1] for x in model.linear if "linear_proj" in x.name and (x.block or 0) >= lowest)
    return 4.0 * pairs * sum(heads_and_channels)


# --- what selection and the optimizer add ---------------------------------------------------------------------------


def sketch_flops(
    model: ModelLayout, selection: SelectionConfig, length: int, projections: Projections
) -> tuple[float, float]:
    """Count projections, features and dot products of one candidate and of one proxy sequence of `length` tokens."""
    k, wanted = selection.sketch, selection.redundancy.scale != "off"
    candidate = proxy = 0.0
    for x in model.scored(selection):
        rows, columns = x.shape
        features = _features(k, rows, columns, length, projections)
        if k.alignment == "features":
            candidate += features
            proxy += features
            continue
        candidate += features if wanted else 0.0
        if k.alignment == "direction":
            candidate += 2.0 * length * (rows * columns + columns)
            proxy += 2.0 * length * rows * columns
            continue
        sketched, other = (rows, columns) if x.cut == "columns" else (columns, rows)
        s = min(k.one_sided_dim, sketched)
        side = 2.0 * length * sketched * (s if projections == "products" else 1)
        candidate += side + 2.0 * length * (other * s + s)
        proxy += side + 2.0 * length * other * s
    return candidate, proxy


def _features(k: SketchConfig, rows: int, columns: int, length: int, projections: Projections) -> float:
    if k.operator == "materialise":  # the gradient, its signs, and the scatter
        return 2.0 * rows * columns * (length + 1)
    w_o, w_i = two_sided_shape(k.dim if k.operator == "two_sided" else k.intermediate_dim, rows, columns)
    sides = rows * w_o + columns * w_i if projections == "products" else rows + columns
    second = float(w_o * w_i) if k.operator == "two_stage" else 0.0
    return 2.0 * length * (sides + w_o * w_i) + second


def _geometry(config: RunConfig) -> str:
    kind = config.selection.preconditioner.kind
    return config.optimizer.name if kind == "auto" else kind


def _preconditioner(config: RunConfig, model: ModelLayout) -> float:
    """Count one reading of the optimizer state, and putting it into the projections."""
    s = config.selection
    geometry, total = _geometry(config), 0.0
    own = config.optimizer.muon_num_ns_steps if config.parallel.engine == "megatron" else NEWTON_SCHULZ_STEPS
    steps = s.preconditioner.muon_steps or own
    features = s.sketch.alignment == "features" or s.redundancy.scale != "off"
    for x in model.scored(s):
        rows, columns = x.shape
        if geometry == "adamw" and s.preconditioner.form == "exact":
            times = (s.sketch.alignment == "direction") + (features and s.sketch.operator == "materialise")
            total += 5.0 * rows * columns * times
        elif geometry == "adamw":
            total += 2.0 * rows * columns
        elif geometry == "muon":
            small, large = min(rows, columns), max(rows, columns)
            width = 0
            if features and s.sketch.operator in ("two_sided", "two_stage"):
                dim = s.sketch.dim if s.sketch.operator == "two_sided" else s.sketch.intermediate_dim
                width += two_sided_shape(dim, rows, columns)[1 if rows > columns else 0]
            if s.sketch.alignment == "one_sided":
                width += min(s.sketch.one_sided_dim, rows if x.cut == "columns" else columns)
            if s.sketch.alignment == "direction":
                width += large
            total += 2.0 * small**2 * large + _gram_steps(small, steps) + 2.0 * small**2 * width
    return total


def _gram_steps(small: int, steps: int) -> float:
    """Count Newton-Schulz on the Gram side: A^2 in each step, S Z in all but the first, Z A Z in all but the last."""
    return 2.0 * small**3 * (steps + (steps - 1) + 2 * (steps - 1))


def _update(config: RunConfig, model: ModelLayout) -> float:
    total = ELEMENTWISE_UPDATE * model.local_size()
    if config.optimizer.name == "muon":
        for x in model.linear:
            small, large = min(x.shape), max(x.shape)
            if config.parallel.engine == "megatron":  # each step forms X X^T, its square, and multiplies X by them
                total += config.optimizer.muon_num_ns_steps * (4.0 * small**2 * large + 2.0 * small**3)
            else:
                total += 4.0 * small**2 * large + _gram_steps(small, NEWTON_SCHULZ_STEPS)
    return total
