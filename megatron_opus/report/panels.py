"""Which pictures a page has, section by section: `Panel`s from records and decisions, nothing drawn yet.

Every section is a list of panels; one without data is not in it. Curves against steps are means over at most `POINTS`
bins of steps; the faint band about a curve that was smoothed goes from the 10% to the 90% quantile of each bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_opus.report.decisions import Decisions
from megatron_opus.report.pictures import MUTED, Panel, number
from megatron_opus.report.record import SHARE, VALIDATION, RunRecord
from megatron_opus.style import MOST_LINES, colour

POINTS = 200
MOST_DOMAINS = 12  # panels of one kind; the others are in the tables
TOKENS, STEPS = "update tokens", "step"
NATS = "nats per token"
DOTTED = (0, (1, 1.5))

# diagnostic -> (title, label of the axis, begins at 0)
KNOWN = {
    "entropy_ratio": ("Entropy of the draw", "share of a uniform draw's", True),
    "top_k_share": ("Agreement: drawn candidates among the K best", "share of the draw", True),
    "temperature": ("Temperature of the draw", "in the utility's unit", True),
    "expert_load_offered": ("Busiest expert, of all candidates", "tokens over the mean expert's", True),
    "expert_load_chosen": ("Busiest expert, of the chosen ones", "tokens over the mean expert's", True),
    "redundancy_share": ("Redundancy in what decided the draw", "share", True),
}
OPTIMISATION = {
    "lr": ("Learning rate", "per step", True),
    "grad_norm": ("Norm of the gradient, before clipping", "norm", True),
}
COST = {
    "memory_bytes": ("Memory of rank 0", "GiB", True),
    "score_bytes_sent": ("Bytes sent by scoring", "MiB per step and rank", True),
}
SCALES = {"memory_bytes": 2.0**-30, "score_bytes_sent": 2.0**-20}


def clock(records: Sequence[RunRecord]) -> tuple[str, float]:
    """(unit, seconds in it) in which the longest run takes a readable number."""
    longest = max((float(r.seconds[-1]) for r in records if len(r) and np.isfinite(r.seconds[-1])), default=0.0)
    for unit, seconds in (("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 3 * seconds:
            return unit, seconds
    return "seconds", 1.0


def validation_domains(records: Sequence[RunRecord]) -> list[str]:
    """Those of the first run, then others, in order."""
    return list(dict.fromkeys(name for record in records for name in record.named(VALIDATION)))


def validation(records: Sequence[RunRecord], targets: Sequence[str], by_clock: bool) -> list[Panel]:
    """One panel for each validation domain, targets first."""
    unit, seconds = clock(records)
    names = validation_domains(records)
    panels = []
    for domain in sorted(names, key=lambda name: name not in targets)[:MOST_DOMAINS]:
        title = f"{domain}{' (target)' if domain in targets else ''}"
        panel = Panel(title, unit if by_clock else TOKENS, NATS)
        for run, record in enumerate(records):
            if domain not in record.named(VALIDATION) or not len(record.evaluated):
                continue
            xs = record.seconds / seconds if by_clock else record.tokens
            curve = record.curve(domain, xs)
            x, y = [p[0] for p in curve], [p[1] for p in curve]
            if not np.isfinite(y).any():
                continue
            panel.line(run, x, y, tip=record.label)
            if len(curve) <= 60:
                unit_of_x = unit if by_clock else "tokens"
                panel.points(
                    run, x, y, [f"{record.label}: {b:.4f} after {number(a, a / 1000)} {unit_of_x}" for a, b in curve]
                )
        panels.append(panel)
    return drawn(panels)


def training_loss(records: Sequence[RunRecord]) -> list[Panel]:
    """Draw means over bins of steps, against update tokens."""
    panel = Panel("Training loss", TOKENS, NATS)
    for run, record in enumerate(records):
        loss = record.column("loss")
        if loss is not None:
            _smoothed(panel, run, record.label, record.tokens, loss)
    return drawn([panel])


def diagnostics(records: Sequence[RunRecord], wanted: dict[str, tuple[str, str, bool]]) -> list[Panel]:
    panels = []
    for name, (title, label, zero) in wanted.items():
        panel = Panel(title, STEPS, label)
        panel.zero = zero
        for run, record in enumerate(records):
            values = record.column(name)
            if values is not None:
                _smoothed(panel, run, record.label, record.step, values * SCALES.get(name, 1.0))
        _cut(panel, [record.columns[name] * SCALES.get(name, 1.0) for record in records if name in record.columns])
        panels.append(panel)
    return drawn(panels)


def _cut(panel: Panel, values: Sequence[np.ndarray]) -> None:
    """A few values many times as large as all others must not flatten these: the axis then ends below them."""
    pooled = np.concatenate([v[np.isfinite(v)] for v in values] or [np.empty(0)])
    if not len(pooled):
        return
    usual = float(np.quantile(pooled, 0.98))
    if pooled.min() >= 0 and 0 < 4 * usual < pooled.max():
        panel.top = 1.3 * usual
        panel.title += " (axis cut)"


def buffer_size(record: RunRecord) -> float | None:
    """N, by the tokens that were offered at the last step."""
    tokens, length = record.columns.get("candidate_tokens"), record.setting("data.seq_length")
    if tokens is None or not isinstance(length, int) or not len(record) or not np.isfinite(tokens[-1]):
        return None
    return float(tokens[-1] / length / (record.step[-1] + 1))


def domain_mix(records: Sequence[RunRecord], decisions: Sequence[Decisions | None]) -> list[Panel]:
    """One panel for each candidate domain: its share of what was chosen, and dotted of what was offered."""
    totals: dict[str, float] = {}
    for record in records:
        for name in record.named(SHARE):
            totals[name] = totals.get(name, 0.0) + float(np.nanmean(record.columns[SHARE + name]))
    panels = []
    for domain in sorted(totals, key=lambda name: -totals[name])[:MOST_DOMAINS]:
        panel = Panel(domain, STEPS, "share of sequences")
        panel.zero = True
        for run, (record, found) in enumerate(zip(records, decisions, strict=True)):
            # with more runs there would be more than seven lines
            if found is not None and domain in found.domains and 2 * len(records) <= MOST_LINES:
                d, offers = found.domains.index(domain), found.offered.sum(axis=1)
                share = np.divide(found.offered[:, d], offers, out=np.full(len(offers), math.nan), where=offers > 0)
                panel.line(run, found.step, share, style=DOTTED, linewidth=1.2, tip=f"{record.label}: offered")
            chosen = record.column(SHARE + domain)
            if chosen is not None:
                x, y = binned(record.step, chosen, min(60, max(10, len(record) // 5)))
                panel.line(run, x, y, tip=f"{record.label}: chosen")
        panels.append(panel)
    return drawn(panels)


def utilities(records: Sequence[RunRecord], decisions: Sequence[Decisions | None]) -> list[Panel]:
    """Draw for each run with utilities how far the chosen candidates lie above the others, over the steps."""
    panels = []
    for run, (record, found) in enumerate(zip(records, decisions, strict=True)):
        if found is None or not found.has_utility:
            continue
        panel = Panel(f"{record.label}: standardised utility", STEPS, "standard deviations")
        for fate, face, name in ((0, MUTED, "not chosen"), (1, colour(run), "chosen")):
            low, _, middle, _, high = found.standardised[:, fate].T
            panel.band(run, found.step, low, high, of=face, opacity=0.25)
            style = "-" if fate else (0, (4, 2))
            panel.line(run, found.step, middle, color=face, style=style, tip=f"{record.label}: {name}, median")
        panels.append(panel)
    return panels


def step_seconds(records: Sequence[RunRecord]) -> list[Panel]:
    """For each run the parts of a step, stacked: scoring, the rest of choosing where it was measured, the rest."""
    panels, highest = [], 0.0
    for run, record in enumerate(records):
        total = record.column("step_seconds")
        if total is None:
            continue
        panel = Panel(f"{record.label}: seconds of a step", STEPS, "seconds")
        panel.zero = True
        x, whole = binned(record.step, total, 60)
        scoring = binned(record.step, np.nan_to_num(record.columns.get("score_seconds", np.zeros(len(record)))), 60)[1]
        choosing = scoring
        if (chosen := record.column("choose_seconds")) is not None:
            choosing = np.maximum(binned(record.step, chosen, 60)[1], scoring)
        for low, high, face, opacity in (
            (np.zeros_like(scoring), scoring, colour(run), 0.75),
            (scoring, choosing, colour(run), 0.35),
            (choosing, whole, MUTED, 0.3),
        ):
            panel.band(run, x, low, high, of=face, opacity=opacity)
        panel.line(run, x, whole, color=MUTED, linewidth=0.9, style="-", tip=f"{record.label}: whole step")
        panels.append(panel)
        # the first steps may take many times as long as the others: they must not flatten the rest
        highest = max(highest, 1.15 * float(np.nanquantile(whole, 0.97)))
    for panel in panels:
        panel.top = highest or None
    return panels


def binned(step: np.ndarray, values: np.ndarray, most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """(middle step, mean of the finite values) of at most `most` equally long bins; NaN for one without any."""
    if len(step) <= most:
        return step.astype(np.float64), np.where(np.isfinite(values), values, math.nan)
    place = (np.arange(len(step)) * most // len(step)).astype(np.int64)
    finite = np.isfinite(values)
    count = np.bincount(place, finite, most)
    total = np.bincount(place, np.where(finite, values, 0.0), most)
    x = np.bincount(place, step, most) / np.bincount(place, minlength=most)
    return x, np.divide(total, count, out=np.full(most, math.nan), where=count > 0)


def _smoothed(panel: Panel, run: int, label: str, x: np.ndarray, y: np.ndarray) -> None:
    """Draw the mean of each of at most 50 bins, with a band from the 10% to the 90% quantile of single steps.

    Of fewer than 100 steps every one is drawn: 200 steps make 50 bins of four.
    """
    if len(y) < 100:
        panel.line(run, x, np.where(np.isfinite(y), y, math.nan), tip=label)
        return
    pieces = [piece[np.isfinite(piece)] for piece in np.array_split(y, 50)]
    low, high = (np.array([np.quantile(p, q) if len(p) else math.nan for p in pieces]) for q in (0.1, 0.9))
    middle = np.array([float(np.mean(piece)) for piece in np.array_split(x.astype(np.float64), 50)])
    panel.band(run, middle, low, high, opacity=0.16)
    panel.line(run, middle, np.array([p.mean() if len(p) else math.nan for p in pieces]), tip=label)


def drawn(panels: Iterable[Panel]) -> list[Panel]:
    return [panel for panel in panels if not panel.empty]
