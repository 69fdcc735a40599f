"""FLOPs of one optimizer step and of the selection in it, counted from shapes. Nothing is run.

A multiply-add is two. All ranks together, T tokens in each of B sequences, matrices [O, I], h heads of c channels, V
rows of the padded vocabulary, s the one-sided dimension, w_O and w_I the widths of the two-sided sketch, F features:

    linear layers       forward 2 B T O I; gradient of the input as much, gradient of the weight as much
    output layer        the same with V x hidden
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

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_opus.config import ModelConfig, RunConfig
from megatron_opus.layout.scored import Layout, scored_blocks, scored_matrices
from megatron_opus.layout.shapes import count_parameters, parameter_shapes
from megatron_opus.layout.sharding import head_channels, padded_vocab_size
from megatron_opus.selection.sketch import two_sided_shape

Attention = Literal["causal", "dense"]
Projections = Literal["products", "sums"]  # how a bucket sketch is applied: on an accelerator, on a CPU
ELEMENTWISE_UPDATE = 18.0  # AdamW: 15 operations for each parameter, clipping 3
NEWTON_SCHULZ_STEPS = 5  # DeepSpeed's default


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one optimizer step, all ranks together; `update` and `selection` by part."""

    update: Mapping[str, float]
    selection: Mapping[str, float]

    @property
    def overhead(self) -> float:
        """(step with selection - step without) / step without."""
        return sum(self.selection.values()) / sum(self.update.values())

    @property
    def tax(self) -> float:
        """Scoring / its forward and backward passes: the sketch tax in FLOPs."""
        passes = self.selection["forward"] + self.selection["backward"]
        return (passes + self.selection["sketch"] + self.selection["preconditioner"]) / passes


def step_flops(
    config: RunConfig, *, attention: Attention = "causal", projections: Projections = "products"
) -> StepFlops:
    """Of a recipe whose vocabulary is known (ConfigError otherwise); selection by a strategy that scores gradients.

    What is not done at every step (`proxy_refresh_every`, `preconditioner.refresh_every`) counts its share.
    """
    s, t, m = config.selection, config.training, config.model
    length, n, k = config.data.seq_length, config.buffer_size, t.global_batch_size
    update = {
        "forward": k * forward(m, length, attention),
        "backward": k * backward(m, length, attention),
        "recompute": k * blocks_forward(m, length, attention) if t.recompute == "full" else 0.0,
        "optimizer": _update(config),
    }
    window = min(s.score_length, length)
    proxies = s.proxy_batch_size / s.proxy_refresh_every
    windows = s.score_windows * (n + proxies)
    candidate, proxy = sketch_flops(config, window, projections)
    wanted = s.redundancy.scale != "off"
    features = s.sketch.dim * (1 if s.sketch.scope == "model" else len(_whole_matrices(config)))
    selection = {
        "forward": windows * forward(m, window, attention),
        "backward": windows * scoring_backward(config, window, attention),
        "sketch": s.score_windows * (n * candidate + proxies * proxy),
        "preconditioner": _preconditioner(config) / s.preconditioner.refresh_every,
        "interaction": 2.0 * n * n * features * wanted + 2.0 * n * k,
    }
    return StepFlops(update=update, selection=selection)


# --- passes over one sequence ---------------------------------------------------------------------------------------


def forward(model: ModelConfig, length: int, attention: Attention) -> float:
    """One sequence through blocks and output layer; the embedding is a table look-up."""
    return blocks_forward(model, length, attention) + _output(model, length)


def backward(model: ModelConfig, length: int, attention: Attention) -> float:
    """Gradients of all weights and activations."""
    products = sum(2.0 * length * rows * columns for _, rows, columns in _matrices(model)) + _output(model, length)
    return 2.0 * products + model.num_layers * 2.5 * _attention(model, length, attention)


def blocks_forward(model: ModelConfig, length: int, attention: Attention) -> float:
    products = sum(2.0 * length * rows * columns for _, rows, columns in _matrices(model))
    return products + model.num_layers * _attention(model, length, attention)


def scoring_backward(config: RunConfig, length: int, attention: Attention) -> float:
    """Gradients of activations from the loss down to the lowest scored output, of one sequence."""
    m = config.model
    lowest = min(scored_blocks(m.num_layers, config.selection.scored_layers))
    reached = [(n, r, c) for n, r, c in _matrices(m) if _block(n) >= lowest]
    if config.selection.score_embedding:  # the gradient of the embedding's output lies below everything
        lowest, reached = -1, _matrices(m)
    first = f"layers.{lowest}.self_attention.linear_qkv"
    products = sum(2.0 * length * r * c for n, r, c in reached if first not in n)
    blocks = m.num_layers - max(lowest, 0)
    return products + _output(m, length) + blocks * 2.5 * _attention(m, length, attention)


def _matrices(model: ModelConfig) -> list[tuple[str, int, int]]:
    """(name, rows, columns) of the blocks' matrices."""
    shapes = parameter_shapes(_with_positions(model), padded=True)
    return [(n, x[0], x[1]) for n, x in shapes.items() if n.startswith("decoder.layers.") and len(x) == 2]


def _with_positions(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, max_position_embeddings=model.max_position_embeddings or 1)


def _block(name: str) -> int:
    return int(name.split(".")[2])


def _output(model: ModelConfig, length: int) -> float:
    return 2.0 * length * padded_vocab_size(model) * model.hidden_size


def _attention(model: ModelConfig, length: int, attention: Attention) -> float:
    pairs = length * (length + 1) / 2 if attention == "causal" else float(length) ** 2
    return 4.0 * pairs * model.num_attention_heads * head_channels(model)


# --- what selection and the optimizer add ---------------------------------------------------------------------------


def _whole_matrices(config: RunConfig) -> list[tuple[int, int, bool]]:
    """(rows, columns, columns are cut) of the scored matrices, not divided by tensor parallelism."""
    return scored_matrices(config, Layout(tp=1, dp=1, zero_stage=0, micro_batch_size=1))


def sketch_flops(config: RunConfig, length: int, projections: Projections) -> tuple[float, float]:
    """Of one candidate and of one proxy sequence of `length` scored tokens: projections, features, dot products."""
    k, wanted = config.selection.sketch, config.selection.redundancy.scale != "off"
    candidate = proxy = 0.0
    for rows, columns, cut in _whole_matrices(config):
        features = _features(config, rows, columns, length, projections)
        if k.alignment == "features":
            candidate += features
            proxy += features
            continue
        candidate += features if wanted else 0.0
        if k.alignment == "direction":
            candidate += 2.0 * length * (rows * columns + columns)
            proxy += 2.0 * length * rows * columns
            continue
        sketched, other = (rows, columns) if cut else (columns, rows)
        s = min(k.one_sided_dim, sketched)
        side = 2.0 * length * sketched * (s if projections == "products" else 1)
        candidate += side + 2.0 * length * (other * s + s)
        proxy += side + 2.0 * length * other * s
    return candidate, proxy


def _features(config: RunConfig, rows: int, columns: int, length: int, projections: Projections) -> float:
    k = config.selection.sketch
    if k.operator == "materialise":  # the gradient, its signs, and the scatter
        return 2.0 * rows * columns * (length + 1)
    w_o, w_i = two_sided_shape(k.dim if k.operator == "two_sided" else k.intermediate_dim, rows, columns)
    sides = rows * w_o + columns * w_i if projections == "products" else rows + columns
    second = float(w_o * w_i) if k.operator == "two_stage" else 0.0
    return 2.0 * length * (sides + w_o * w_i) + second


def _geometry(config: RunConfig) -> str:
    kind = config.selection.preconditioner.kind
    return config.optimizer.name if kind == "auto" else kind


def _preconditioner(config: RunConfig) -> float:
    """Reading the optimizer state and putting it into the projections, once."""
    s = config.selection
    geometry, total = _geometry(config), 0.0
    steps = s.preconditioner.muon_steps or NEWTON_SCHULZ_STEPS
    features = s.sketch.alignment == "features" or s.redundancy.scale != "off"
    for rows, columns, cut in _whole_matrices(config):
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
                width += min(s.sketch.one_sided_dim, rows if cut else columns)
            if s.sketch.alignment == "direction":
                width += large
            total += 2.0 * small**2 * large + _gram_steps(small, steps) + 2.0 * small**2 * width
    return total


def _gram_steps(small: int, steps: int) -> float:
    """Newton-Schulz on the Gram side alone: A^2 in each step, S Z in all but the first, Z A Z in all but the last."""
    return 2.0 * small**3 * (steps + (steps - 1) + 2 * (steps - 1))


def _update(config: RunConfig) -> float:
    total = ELEMENTWISE_UPDATE * count_parameters(_with_positions(config.model), padded=True)
    if config.optimizer.name == "muon":
        for _, rows, columns in _matrices(config.model):
            small, large = min(rows, columns), max(rows, columns)
            total += 4.0 * small**2 * large + _gram_steps(small, NEWTON_SCHULZ_STEPS)
    return total
