"""Draw the pictures of an experiment from its report.json: what each arm gains, and losses over tokens and seconds.

The file says everything that a picture shows, so the pictures of old experiments can be drawn again without their runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opus import style
from megatron_opus.studies.lab.intervals import Interval, interval

Points = Sequence[Sequence[float]]
Row = tuple[str, Interval, list[float]]  # label, mean and interval, the difference of each seed


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the content of a report.json into `folder`; return the paths. Raises PictureError without matplotlib.

    differences.png has a row for each arm against the baseline, contrasts.png a row for each contrast (left out where
    there is none), loss_tokens.png and loss_seconds.png have a curve for at most seven arms.
    """
    pyplot = style.pyplot()
    metric, baseline = ", ".join(report["metric"]), report["baseline"]
    pairs = [(arm["arm"], baseline, arm["arm"]) for arm in report["arms"] if arm["arm"] != baseline]
    differences = sorted(_rows(report, pairs), key=lambda row: row[1].mean, reverse=True)
    contrasts = _rows(report, [(c["arm"], c["other"], f"{c['arm']} - {c['other']}") for c in report["contrasts"]][::-1])
    made = []
    for name, rows, label in (
        ("differences.png", differences, f"final loss on {metric} minus {baseline}'s, nats; left is better"),
        ("contrasts.png", contrasts, f"difference of the final loss on {metric}, nats; left: the first is better"),
    ):
        if rows:
            made.append(_draw_rows(pyplot, rows, label, report["name"], folder / name))
    kind = "processor seconds" if report["clock"] == "cpu" else "seconds"
    for name, key, label in (
        ("loss_tokens.png", "by_tokens", "update tokens"),
        ("loss_seconds.png", "by_seconds", f"{kind} of training steps, scoring included"),
    ):
        made.append(_draw_curves(pyplot, report, key, label, folder / name))
    return made


def band(curves: Sequence[Points]) -> tuple[list[float], list[Interval]]:
    """Return the mean x and the interval of the loss at every evaluation that all curves have."""
    xs, losses = [], []
    for points in zip(*curves, strict=False):
        found = interval([loss for _, loss in points])
        assert found is not None
        xs.append(math.fsum(x for x, _ in points) / len(points))
        losses.append(found)
    return xs, losses


def shown(report: Mapping[str, Any]) -> list[str]:
    """Choose the arms of a picture of curves: the baseline and the first six others, in the order of the protocol.

    The order is the author's, fixed before the first run, so that no arm is left out for how it ended.
    """
    finished = [arm["arm"] for arm in report["arms"] if arm["seeds"]]
    others = [arm for arm in finished if arm != report["baseline"]][: style.MOST_LINES - 1]
    return [arm for arm in finished if arm in others or arm == report["baseline"]]


def _rows(report: Mapping[str, Any], pairs: Sequence[tuple[str, str, str]]) -> list[Row]:
    """Return for each (arm, other, label) the differences by seed; nothing for a pair without a common seed."""
    losses = {(run["arm"], run["seed"]): run["loss"] for run in report["runs"]}
    rows = []
    for arm, other, label in pairs:
        seeds = [seed for name, seed in losses if name == arm and (other, seed) in losses]
        differences = [losses[arm, seed] - losses[other, seed] for seed in seeds]
        found = interval(differences)
        if found is not None:
            rows.append((f"{label} ({len(seeds)})", found, differences))
    return rows


def _draw_rows(pyplot: Any, rows: Sequence[Row], label: str, title: str, path: Path) -> Path:
    """Draw a tick for each seed, and a dot with the 95% interval: coloured where the interval leaves out 0."""
    figure, axes = pyplot.subplots(figsize=(7.5, 1.2 + 0.32 * len(rows)), layout="constrained")
    for y, (_, found, differences) in enumerate(rows):
        better = style.colour(0) if found.mean < 0 else style.colour(1)
        look = {"color": better if found.clear else style.UNCLEAR, "capsize": 3}
        axes.errorbar([found.mean], [y], xerr=[found.half or 0.0], fmt="o", **look)
        axes.plot(differences, [y] * len(differences), "|", color=style.BASELINE, alpha=0.6)
    axes.axvline(0.0, color=style.BASELINE, linestyle="--", linewidth=1)
    reach = max(abs(x) for _, found, differences in rows for x in (*differences, found.mean))
    if reach:  # an interval over two seeds is wider than what matters
        axes.set_xlim(-1.6 * reach, 1.6 * reach)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set(xlabel=label, title=title)
    axes.grid(visible=False, axis="y")
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _draw_curves(pyplot: Any, report: Mapping[str, Any], key: str, label: str, path: Path) -> Path:
    """Draw for each arm the mean loss over its seeds with the 95% band."""
    figure, axes = pyplot.subplots(figsize=(9, 4.6), layout="constrained")
    arms, place = shown(report), 0
    late: list[float] = []
    for arm in arms:
        curves = [run[key] for run in report["runs"] if run["arm"] == arm]
        xs, losses = band(curves)
        look: dict[str, Any] = {"linestyle": "--", "color": style.BASELINE}
        if arm != report["baseline"]:
            look = {"color": style.colour(place), "marker": style.marker(place), "markersize": 3.5}
            place += 1
        axes.plot(xs, [v.mean for v in losses], linewidth=1.4, label=f"{arm} ({len(curves)})", **look)
        low, high = ([v.mean + sign * (v.half or 0.0) for v in losses] for sign in (-1, 1))
        axes.fill_between(xs, low, high, alpha=0.1, color=look["color"], linewidth=0)
        # the first steps would squeeze what matters into a line, and so would the band of two seeds
        late += [loss for curve in curves for _, loss in curve[len(curve) // 4 :] if math.isfinite(loss)]
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.05
        axes.set_ylim(min(late) - margin, max(late) + margin)
    left_out = sum(1 for arm in report["arms"] if arm["seeds"]) - len(arms)
    title = (
        f"{report['name']}: the first {len(arms)} arms, {left_out} more in the table" if left_out else report["name"]
    )
    axes.set(xlabel=label, ylabel=f"loss on {', '.join(report['metric'])}, nats per token", title=title)
    axes.set_xlim(left=0)
    figure.legend(title="arm (seeds)\nband: 95%", loc="outside right upper", fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)
    return path
