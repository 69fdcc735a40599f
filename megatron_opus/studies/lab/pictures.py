"""Pictures of an experiment: what each arm gains, and losses over update tokens and seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_opus.runs.curves import Run
from megatron_opus.studies.lab.experiment import LabError
from megatron_opus.studies.lab.intervals import Interval, interval
from megatron_opus.studies.lab.report import Points, Results, by_seconds, by_tokens, final_loss


def band(curves: Sequence[Points]) -> tuple[list[float], list[Interval]]:
    """Mean x and the interval of the loss at every evaluation that all curves have."""
    xs, losses = [], []
    for points in zip(*curves, strict=False):
        found = interval([loss for _, loss in points])
        assert found is not None
        xs.append(math.fsum(x for x, _ in points) / len(points))
        losses.append(found)
    return xs, losses


def draw(results: Results, folder: Path) -> list[Path]:
    """loss_tokens.png and loss_seconds.png, mean and 95% band of every arm; differences.png, what each gains;
    contrasts.png, where the experiment names any.

    Raises LabError without matplotlib.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise LabError(f"pictures need matplotlib ({error}): pip install -e '.[lab]'") from None
    e = results.experiment
    loss = f"final loss on {', '.join(e.metric)}"
    made = []
    for file, rows, label in (
        ("differences.png", _differences(results), f"{loss} minus {e.baseline}'s, nats; left is better"),
        ("contrasts.png", _contrasts(results), f"difference of the {loss}, nats; left: the first is better"),
    ):
        if rows or file == "differences.png":
            made.append(_draw_rows(rows, label, e.name, folder / file, pyplot))
    kind = "processor seconds" if e.clock == "cpu" else "seconds"
    pictures: tuple[tuple[str, Callable[[Run], Points], str], ...] = (
        ("loss_tokens.png", lambda run: by_tokens(run, e.metric), "update tokens"),
        (
            "loss_seconds.png",
            lambda run: by_seconds(run, e.metric, e.clock),
            f"{kind} of training steps, scoring included",
        ),
    )
    for name, points_of, label in pictures:
        figure, axes = pyplot.subplots(figsize=(9.5, 5), layout="constrained")
        lowest, highest = math.inf, -math.inf
        others = [arm.arm for arm in results.arms if arm.arm != e.baseline]
        palette = pyplot.get_cmap("tab10" if len(others) <= 10 else "tab20")
        for arm in results.arms:
            curves = [points_of(results.runs[arm.arm, seed]) for seed in arm.seeds]
            if not curves:
                continue
            xs, losses = band(curves)
            style: dict[str, Any] = {"linestyle": "--", "color": "black"}
            if arm.arm != e.baseline:
                place = others.index(arm.arm)
                # where 20 colours do not do, the line tells
                style = {"linestyle": ("-", ":", "-.")[place // 20 % 3], "color": palette(place % palette.N)}
            means, halves = [v.mean for v in losses], [v.half or 0.0 for v in losses]
            (line,) = axes.plot(xs, means, marker=".", label=f"{arm.arm} ({len(curves)})", **style)
            axes.fill_between(
                xs,
                [m - h for m, h in zip(means, halves, strict=True)],
                [m + h for m, h in zip(means, halves, strict=True)],
                alpha=0.12,
                color=line.get_color(),
                linewidth=0,
            )
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), linewidth=0.6, alpha=0.5, color=line.get_color())
            # the first steps would squeeze what matters into a line, and so would the band of two seeds
            late = [loss for curve in curves for _, loss in curve[len(curve) // 4 :]]
            lowest, highest = min(lowest, *late), max(highest, *late)
        if math.isfinite(lowest):
            margin = 0.05 * (highest - lowest) or 0.05
            axes.set_ylim(lowest - margin, highest + margin)
        axes.set(xlabel=label, ylabel=f"loss on {', '.join(e.metric)}, nats per token", title=e.name)
        axes.set_xlim(left=0)
        figure.legend(title="arm (seeds)\nthin: a seed, band: 95%", loc="outside right upper", fontsize=8)
        axes.grid(alpha=0.3)
        figure.savefig(folder / name, dpi=120)
        pyplot.close(figure)
        made.append(folder / name)
    return made


Row = tuple[str, Interval, list[float]]  # label, mean and interval, the seeds


def _differences(results: Results) -> list[Row]:
    """Final loss minus the baseline's, the best last."""
    e, rows = results.experiment, []
    for arm in results.arms:
        if arm.difference is not None:
            rows.append((f"{arm.arm} ({arm.difference.count})", arm.difference, _by_seed(results, arm.arm, e.baseline)))
    return sorted(rows, key=lambda row: row[1].mean, reverse=True)


def _contrasts(results: Results) -> list[Row]:
    return [
        (f"{c.arm} - {c.other} ({len(c.seeds)})", c.difference, _by_seed(results, c.arm, c.other))
        for c in reversed(results.contrasts)
        if c.difference is not None
    ]


def _by_seed(results: Results, arm: str, other: str) -> list[float]:
    runs, metric = results.runs, results.experiment.metric
    seeds = [s for s in results.experiment.seeds if (arm, s) in runs and (other, s) in runs]
    return [final_loss(runs[arm, s], metric) - final_loss(runs[other, s], metric) for s in seeds]


def _draw_rows(rows: Sequence[Row], label: str, title: str, path: Path, pyplot: Any) -> Path:
    """A dot per seed, mean and 95% interval per row; coloured where the interval leaves out 0."""
    figure, axes = pyplot.subplots(figsize=(7.5, 1.2 + 0.32 * max(1, len(rows))), layout="constrained")
    reach = 0.0
    for y, (_, found, seeds) in enumerate(rows):
        reach = max(reach, *(abs(x) for x in (*seeds, found.mean)))
        colour = ("tab:blue" if found.mean < 0 else "tab:red") if found.clear else "gray"
        axes.errorbar([found.mean], [y], xerr=[found.half or 0.0], fmt="o", color=colour, capsize=3)
        axes.plot(seeds, [y] * len(seeds), "|", color="black", alpha=0.6)
    axes.axvline(0.0, color="black", linestyle="--", linewidth=1)
    if reach:  # an interval over two seeds is wider than what matters
        axes.set_xlim(-1.6 * reach, 1.6 * reach)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set(xlabel=label, title=title)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
