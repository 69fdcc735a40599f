"""Estimate what scoring sends in one step, by arithmetic on the recipe: the payload one rank hands to collectives.

N candidates, n = N / DP and p = K_p / DP on a rank, R scored matrices [O_r, I_r], O_r and I_r cut by TP where tensor
parallelism cuts them, m the sketch dimension, F = R m features (scope `model`: m), s the one-sided dimension, T scored
tokens of a sequence, e bytes of an activation:

    second moments   8 sum (O + I) of the whole matrices, over TP, and over DP from ZeRO 1 on (AdamW, separable)
    exact            4 sum (O I) over DP from ZeRO 1 on
    Muon             8 + 4 w d over DP for each matrix, d the side that carries the multiplier, w the columns of all
                     sketches of it; ZeRO 3: and 4 O I, the momentum
    proxy            features: 4 F over TP and over DP. one_sided: 4 s sum (cut side) over DP. direction: 4 sum (O I)
    candidates       4 n F over TP where features are wanted; 8 n over TP unless the alignment comes from them
    scores           12 n gathered over DP; 4 n F gathered over DP for the redundancy (scope `global`)
    agreement        12 N + 8 N^2 broadcast over DP and over TP
    sequence parallel   e T (n + p) w / TP for the scattered factor of each matrix, w its projected width; for
                        candidates its whole width where Muon's multiplier stands on that side

`second moments` and Muon's are sent every `refresh_every` steps, `proxy` every `proxy_refresh_every`. With
`selection.controller` the proxy is sent in halves, each as large, and every alignment twice. Nothing grows with the
number of parameters but `exact`, `direction` and Muon's momentum at ZeRO 3. The tests compare this with what the
scoring pass counts (tests/scoring/test_sharded.py).
"""

from __future__ import annotations

import math

from megatron_opus.config import RunConfig
from megatron_opus.layout.model_layout import ParameterLayout, recipe_layout
from megatron_opus.layout.parallel_layout import ParallelLayout
from megatron_opus.selection.sketch import two_sided_shape


def scoring_traffic(config: RunConfig, layout: ParallelLayout) -> dict[str, float]:
    """Give the bytes per step and rank of each line above, at the step after a refresh.

    Groups of one process send nothing.
    """
    s, k = config.selection, config.selection.sketch
    tp, dp = layout.tp, layout.dp
    over_tp, over_dp = (1.0 if size > 1 else 0.0 for size in (tp, dp))
    together = 1.0 if s.scope == "global" else 0.0
    model = recipe_layout(config, tp)
    scored = model.scored(s)
    # whole matrix, and the rows and columns that this rank holds of it
    local = [model.local_shape(x.name) for x in scored]
    matrices = [(x, rows, columns) for x, (rows, columns) in zip(scored, local, strict=True)]
    n, p = config.buffer_size / dp, math.ceil(s.proxy_batch_size / dp)
    sharded = over_dp if layout.zero_stage > 0 else 0.0
    features = k.dim if k.scope == "model" else sum(_dim(config, x) for x in scored)
    wanted = k.alignment == "features" or s.redundancy.scale != "off"
    redundancy = 1.0 if s.redundancy.scale != "off" else 0.0
    total = sum(rows * columns for _, rows, columns in matrices)
    sent = dict.fromkeys(("second moments", "Muon", "proxy", "candidates", "scores", "agreement", "tokens"), 0.0)
    geometry = config.optimizer.name if s.preconditioner.kind == "auto" else s.preconditioner.kind
    if geometry == "adamw" and s.preconditioner.form == "exact":
        times = (k.alignment == "direction") + (wanted and k.operator == "materialise")
        sent["second moments"] = 4.0 * total * sharded * times
    elif geometry == "adamw":
        sent["second moments"] = 8.0 * sum(sum(x.shape) for x in scored) * (over_tp + sharded)
    elif geometry == "muon":
        for x, rows, columns in matrices:
            width = _multiplied(config, x, rows, columns, wanted)
            sent["Muon"] += (8.0 + 4.0 * min(rows, columns) * width) * over_dp
            sent["Muon"] += 4.0 * rows * columns * (over_dp if layout.zero_stage == 3 else 0.0)
    if k.alignment == "features":
        sent["proxy"] = 4.0 * features * (over_tp + over_dp)
    elif k.alignment == "one_sided":
        for x, rows, columns in matrices:
            whole, cut = (rows, columns) if x.cut == "columns" else (columns, rows)
            sent["proxy"] += 4.0 * min(k.one_sided_dim, whole) * cut * over_dp
    else:
        sent["proxy"] = 4.0 * total * over_dp
    halves = 1 + s.controller.enabled
    sent["proxy"] = halves * (sent["proxy"] + 4.0 * over_dp)
    sent["candidates"] = (4.0 * n * features if wanted else 0.0) * over_tp
    sent["candidates"] += (8.0 * halves * n if k.alignment != "features" else 0.0) * over_tp
    score = 4.0 + 8.0 * halves
    sent["scores"] = (score * n + 4.0 * n * features * redundancy) * over_dp * together
    seen = config.buffer_size if s.scope == "global" else n
    sent["agreement"] = (score * seen + 8.0 * seen**2 * redundancy) * (over_dp * together + over_tp)
    if config.parallel.sequence_parallel and tp > 1:
        e = 2 if config.training.precision == "bf16" else 4
        tokens = config.scored_length
        for x, rows, columns in matrices:
            candidate, proxy = _gathered_widths(config, x, rows, columns, wanted, geometry)
            sent["tokens"] += e * tokens / tp * (n * candidate + p * proxy)
    return sent


def _dim(config: RunConfig, matrix: ParameterLayout) -> int:
    k = config.selection.sketch
    return math.prod(two_sided_shape(k.dim, *matrix.shape)) if k.operator == "two_sided" else k.dim


def _widths(config: RunConfig, matrix: ParameterLayout) -> tuple[int, int]:
    """Give the columns of the projected b and a of the feature operator; 0: the raw factor."""
    k = config.selection.sketch
    if k.operator not in ("two_sided", "two_stage"):
        return 0, 0
    return two_sided_shape(k.dim if k.operator == "two_sided" else k.intermediate_dim, *matrix.shape)


def _multiplied(config: RunConfig, matrix: ParameterLayout, rows: int, columns: int, wanted: bool) -> int:
    """Count the columns of everything that Muon's multiplier of one matrix is applied to, on its smaller local side."""
    k, side = config.selection.sketch, 1 if rows > columns else 0
    width = 0
    if wanted:
        width += _widths(config, matrix)[side] or min(rows, columns)
    if k.alignment == "one_sided":
        width += min(k.one_sided_dim, matrix.shape[0 if matrix.cut == "columns" else 1])
    if k.alignment == "direction":
        width += max(rows, columns)
    return width


def _gathered_widths(
    config: RunConfig, matrix: ParameterLayout, rows: int, columns: int, wanted: bool, geometry: str
) -> tuple[int, int]:
    """Count the columns per token that are gathered of the scattered factor, for a candidate and a proxy sequence.

    The scattered side is the one that tensor parallelism leaves whole: a of a column-parallel matrix.
    """
    side = 0 if matrix.cut == "columns" else 1
    k, whole = config.selection.sketch, (rows, columns)[side]
    operator = _widths(config, matrix)[side] or whole
    # the multiplier stands on this side, and is the rank's own: the factor itself is gathered, for every part
    raw = geometry == "muon" and side == (1 if rows > columns else 0)
    one_sided = min(k.one_sided_dim, whole)
    candidate = (whole if raw else operator) if wanted else 0
    if k.alignment == "one_sided":
        candidate += whole if raw else one_sided
    if k.alignment == "direction":
        candidate += whole
    proxy = {"features": operator, "one_sided": one_sided, "direction": whole}[k.alignment]
    return candidate, proxy
