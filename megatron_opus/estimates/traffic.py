"""What scoring sends in one step, by arithmetic on the recipe: the payload that one rank hands to collectives.

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

`second moments` and Muon's are sent every `refresh_every` steps, `proxy` every `proxy_refresh_every`. Nothing grows
with the number of parameters but `exact`, `direction` and Muon's momentum at ZeRO 3. The tests compare this with what
the scoring pass counts (tests/scoring/test_sharded.py).
"""

from __future__ import annotations

import math

from megatron_opus.config import RunConfig
from megatron_opus.layout.scored import Layout, scored_matrices
from megatron_opus.selection.sketch import two_sided_shape


def scoring_traffic(config: RunConfig, layout: Layout) -> dict[str, float]:
    """Bytes per step and rank of each line above, at the step after a refresh. Groups of one process send nothing."""
    s, k = config.selection, config.selection.sketch
    tp, dp = layout.tp, layout.dp
    over_tp, over_dp = (1.0 if size > 1 else 0.0 for size in (tp, dp))
    together = 1.0 if s.scope == "global" else 0.0
    matrices = scored_matrices(config, layout)
    n, p = config.buffer_size / dp, math.ceil(s.proxy_batch_size / dp)
    sharded = over_dp if layout.zero_stage > 0 else 0.0
    features = k.dim if k.scope == "model" else sum(_dim(config, tp, x) for x in matrices)
    wanted = k.alignment == "features" or s.redundancy.scale != "off"
    redundancy = 1.0 if s.redundancy.scale != "off" else 0.0
    total = sum(rows * columns for rows, columns, _ in matrices)
    sent = dict.fromkeys(("second moments", "Muon", "proxy", "candidates", "scores", "agreement", "tokens"), 0.0)
    geometry = config.optimizer.name if s.preconditioner.kind == "auto" else s.preconditioner.kind
    if geometry == "adamw" and s.preconditioner.form == "exact":
        times = (k.alignment == "direction") + (wanted and k.operator == "materialise")
        sent["second moments"] = 4.0 * total * sharded * times
    elif geometry == "adamw":
        whole = sum(r * (1 if cut else tp) + c * (tp if cut else 1) for r, c, cut in matrices)
        sent["second moments"] = 8.0 * whole * (over_tp + sharded)
    elif geometry == "muon":
        for rows, columns, cut in matrices:
            side = "cols" if rows > columns else "rows"
            width = _multiplied(config, tp, (rows, columns, cut), side, wanted)
            sent["Muon"] += (8.0 + 4.0 * min(rows, columns) * width) * over_dp
            sent["Muon"] += 4.0 * rows * columns * (over_dp if layout.zero_stage == 3 else 0.0)
    if k.alignment == "features":
        sent["proxy"] = 4.0 * features * (over_tp + over_dp)
    elif k.alignment == "one_sided":
        sent["proxy"] = sum(4.0 * min(k.one_sided_dim, r if cut else c) * (c if cut else r) for r, c, cut in matrices)
        sent["proxy"] *= over_dp
    else:
        sent["proxy"] = 4.0 * total * over_dp
    sent["proxy"] += 4.0 * over_dp
    sent["candidates"] = (4.0 * n * features if wanted else 0.0) * over_tp
    sent["candidates"] += (8.0 * n if k.alignment != "features" else 0.0) * over_tp
    sent["scores"] = (12.0 * n + 4.0 * n * features * redundancy) * over_dp * together
    seen = config.buffer_size if s.scope == "global" else n
    sent["agreement"] = (12.0 * seen + 8.0 * seen**2 * redundancy) * (over_dp * together + over_tp)
    if config.parallel.sequence_parallel and tp > 1:
        e = 2 if config.training.precision == "bf16" else 4
        tokens = min(s.score_length, config.data.seq_length) * s.score_windows
        for x in matrices:
            candidate, proxy = _gathered_widths(config, tp, x, wanted, geometry)
            sent["tokens"] += e * tokens / tp * (n * candidate + p * proxy)
    return sent


def _whole(tp: int, matrix: tuple[int, int, bool]) -> tuple[int, int]:
    rows, columns, cut = matrix
    return rows * (1 if cut else tp), columns * (tp if cut else 1)


def _dim(config: RunConfig, tp: int, matrix: tuple[int, int, bool]) -> int:
    k = config.selection.sketch
    return math.prod(two_sided_shape(k.dim, *_whole(tp, matrix))) if k.operator == "two_sided" else k.dim


def _widths(config: RunConfig, tp: int, matrix: tuple[int, int, bool]) -> tuple[int, int]:
    """Columns of the projected b and a of the feature operator; 0: the raw factor."""
    k = config.selection.sketch
    if k.operator not in ("two_sided", "two_stage"):
        return 0, 0
    return two_sided_shape(k.dim if k.operator == "two_sided" else k.intermediate_dim, *_whole(tp, matrix))


def _multiplied(config: RunConfig, tp: int, matrix: tuple[int, int, bool], side: str, wanted: bool) -> int:
    """Columns of everything that Muon's multiplier of one matrix is applied to."""
    rows, columns, cut = matrix
    k, size = config.selection.sketch, rows if side == "rows" else columns
    width = 0
    if wanted:
        width += _widths(config, tp, matrix)[0 if side == "rows" else 1] or size
    if k.alignment == "one_sided":
        width += min(k.one_sided_dim, _whole(tp, matrix)[0 if cut else 1])
    if k.alignment == "direction":
        width += columns if side == "rows" else rows
    return width


def _gathered_widths(
    config: RunConfig, tp: int, matrix: tuple[int, int, bool], wanted: bool, geometry: str
) -> tuple[int, int]:
    """Columns per token that are gathered of the scattered factor, for a candidate and for a proxy sequence.

    The scattered side is the one that tensor parallelism leaves whole: a of a column-parallel matrix.
    """
    rows, columns, cut = matrix
    k, whole = config.selection.sketch, rows if cut else columns
    operator = _widths(config, tp, matrix)[0 if cut else 1] or whole
    # the multiplier stands on this side, and is the rank's own: the factor itself is gathered, for every part
    raw = geometry == "muon" and ("cols" if rows > columns else "rows") == ("rows" if cut else "cols")
    one_sided = min(k.one_sided_dim, whole)
    candidate = (whole if raw else operator) if wanted else 0
    if k.alignment == "one_sided":
        candidate += whole if raw else one_sided
    if k.alignment == "direction":
        candidate += whole
    proxy = {"features": operator, "one_sided": one_sided, "direction": whole}[k.alignment]
    return candidate, proxy
