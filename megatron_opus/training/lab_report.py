"""The results of an experiment: intervals over seeds, paired with the baseline by seed, as text, JSON, CSV, pictures.

Loss: the mean of the metric's validation domains at the end of a run, nats per token.

Tokens to target: for one seed, the *target* is the worse of the two final losses, of the arm and of the baseline, which
both curves have reached. The ratio is (update tokens of the arm at the target) / (those of the baseline), each
interpolated on its own curve: for a worse arm on the baseline's, for a better one on the arm's. Below 1 is better.
Seconds to target: the same over the clock of the steps, scoring included, evaluation and checkpoints left out; with
`clock: cpu` over the processor's seconds, which tell the same on a machine of one's own, and the truth on a shared one.

Runs of one schedule are compared: in the middle of a run the learning rate has not come down yet, so a better arm
reaches the target later than a run planned for fewer tokens would.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_opus.data.files import atomic_file
from megatron_opus.training.curves import Run, first_reached, read_run
from megatron_opus.training.lab import Experiment, LabError, PlannedRun, is_finished, why_unfinished
from megatron_opus.training.statistics import Interval, interval

Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """All intervals are over seeds; differences and ratios over the seeds that the baseline finished too."""

    arm: str
    strategy: str
    seeds: list[int]  # finished
    loss: Interval | None
    difference: Interval | None  # loss minus the baseline's, same seed
    token_ratio: Interval | None
    second_ratio: Interval | None
    overhead: Interval | None  # seconds per step / the baseline's - 1
    scoring_share: Interval | None  # of the arm's own seconds


@dataclass(frozen=True, kw_only=True)
class Results:
    experiment: Experiment
    arms: list[ArmResult]
    failed: list[tuple[str, str]]  # run, why: never left out
    added_later: list[str]
    runs: dict[tuple[str, int], Run]


def collect(experiment: Experiment, planned: Sequence[PlannedRun], record: Mapping[str, Any]) -> Results:
    """Read every finished run. Raises LabError when the metric's domains are not among those evaluated."""
    runs = {(p.arm, p.seed): read_run(p.directory) for p in planned if is_finished(p)}
    for run in runs.values():
        missing = [d for d in experiment.metric if d not in run.curves]
        if missing:
            raise LabError(f"metric: {run.name} evaluated {', '.join(run.curves)}, not {', '.join(missing)}")
    return Results(
        experiment=experiment,
        arms=[_arm(experiment, arm, runs) for arm in experiment.arms],
        failed=[(p.name, why_unfinished(p)) for p in planned if not is_finished(p)],
        added_later=list(record["added_later"]),
        runs=runs,
    )


def _arm(experiment: Experiment, arm: str, runs: Mapping[tuple[str, int], Run]) -> ArmResult:
    metric, clock = experiment.metric, experiment.clock
    mine = {seed: runs[arm, seed] for seed in experiment.seeds if (arm, seed) in runs}
    pairs = [(mine[s], runs[experiment.baseline, s]) for s in mine if (experiment.baseline, s) in runs]

    def paired(value: Callable[[Run, Run], float]) -> Interval | None:
        return None if arm == experiment.baseline else interval([value(a, b) for a, b in pairs])

    return ArmResult(
        arm=arm,
        strategy=next((run.strategy for run in mine.values()), ""),
        seeds=list(mine),
        loss=interval([final_loss(run, metric) for run in mine.values()]),
        difference=paired(lambda a, b: final_loss(a, metric) - final_loss(b, metric)),
        token_ratio=paired(lambda a, b: ratio_to_target(by_tokens(a, metric), by_tokens(b, metric))),
        second_ratio=paired(lambda a, b: ratio_to_target(by_seconds(a, metric, clock), by_seconds(b, metric, clock))),
        overhead=paired(lambda a, b: (_clock(a, clock)[-1] / a.steps) / (_clock(b, clock)[-1] / b.steps) - 1),
        scoring_share=interval([run.score_seconds / run.seconds for run in mine.values()]),
    )


def by_tokens(run: Run, metric: Sequence[str]) -> Points:
    """(update tokens, mean loss of the metric's domains) at every evaluation."""
    curves = [run.curves[domain] for domain in metric]
    return [(points[0][0], math.fsum(p[1] for p in points) / len(points)) for points in zip(*curves, strict=True)]


def by_seconds(run: Run, metric: Sequence[str], clock: str) -> Points:
    return [(second, loss) for second, (_, loss) in zip(_clock(run, clock), by_tokens(run, metric), strict=True)]


def _clock(run: Run, clock: str) -> list[float]:
    if clock == "cpu" and not run.cpu_clock:
        raise LabError(f"{run.name}: expected step_cpu_seconds in every step of metrics.jsonl for `clock: cpu`")
    return run.cpu_clock if clock == "cpu" else run.clock


def final_loss(run: Run, metric: Sequence[str]) -> float:
    return by_tokens(run, metric)[-1][1]


def ratio_to_target(arm: Points, baseline: Points) -> float:
    """What the arm needed to reach the worse of the two final losses, over what the baseline needed."""
    target = max(arm[-1][1], baseline[-1][1])
    mine, theirs = first_reached(arm, target), first_reached(baseline, target)
    if mine is None or theirs is None:  # a NaN loss
        return math.nan
    return mine / theirs


# --- text, JSON, CSV ------------------------------------------------------------------------------------------------

COLUMNS: tuple[tuple[str, str, int, bool], ...] = (
    ("loss", "final loss", 4, False),
    ("difference", "minus baseline", 4, True),
    ("token_ratio", "tokens to target", 3, False),
    ("second_ratio", "seconds to target", 3, False),
    ("overhead", "overhead", 3, True),
    ("scoring_share", "scoring share", 3, False),
)


def cells(results: Results) -> list[list[str]]:
    """The title row and a row per arm."""
    rows = [["arm", "seeds", *(title for _, title, _, _ in COLUMNS)]]
    for arm in results.arms:
        values = [getattr(arm, key) for key, _, _, _ in COLUMNS]
        texts = ["" if v is None else v.text(d, s) for v, (_, _, d, s) in zip(values, COLUMNS, strict=True)]
        rows.append([arm.arm, f"{len(arm.seeds)}/{len(results.experiment.seeds)}", *texts])
    return rows


def markdown(results: Results) -> str:
    """The table of arms alone; a difference whose interval leaves out 0 is bold."""
    rows = cells(results)
    column = 2 + [key for key, _, _, _ in COLUMNS].index("difference")
    for row, arm in zip(rows[1:], results.arms, strict=True):
        found = arm.difference
        if found is not None and found.half is not None and abs(found.mean) > found.half:
            row[column] = f"**{row[column]}**"
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def table(results: Results) -> str:
    """What was announced, a line per arm, and every run that is missing with the reason."""
    e = results.experiment
    rows = cells(results)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        f"experiment     {e.name}",
        f"hypothesis     {' '.join(e.hypothesis.split())}",
        f"metric         loss on {', '.join(e.metric)} at the end, nats per token",
        f"stopping rule  {' '.join(e.stopping_rule.split())}",
        f"baseline       {e.baseline}; mean ± half of the 95% t-interval over seeds; ratios below 1: it needs less",
        f"clock          {'processor seconds of the run' if e.clock == 'cpu' else 'wall clock'}, evaluation left out",
        "",
        *("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]
    if results.failed:
        lines += ["", "not finished, and not in the table:", *(f"  {name}: {why}" for name, why in results.failed)]
    if results.added_later:
        lines += ["", f"added after the experiment was announced: {', '.join(results.added_later)}"]
    return "\n".join(lines)


def as_json(results: Results) -> dict[str, Any]:
    e, metric = results.experiment, results.experiment.metric
    return {
        "name": e.name,
        "hypothesis": e.hypothesis,
        "metric": list(metric),
        "stopping_rule": e.stopping_rule,
        "baseline": e.baseline,
        "clock": e.clock,
        "arms": [asdict(arm) for arm in results.arms],
        "failed": [{"run": name, "why": why} for name, why in results.failed],
        "added_later": results.added_later,
        "runs": [
            {
                "arm": arm,
                "seed": seed,
                "loss": final_loss(run, metric),
                "all_losses": {domain: run.final(domain) for domain in run.curves},
                "update_tokens": run.update_tokens,
                "seconds": run.seconds,
                "score_seconds": run.score_seconds,
                "by_tokens": by_tokens(run, metric),
                "cpu_seconds": run.cpu_clock[-1] if run.cpu_clock else None,
                "by_seconds": by_seconds(run, metric, e.clock),
            }
            for (arm, seed), run in results.runs.items()
        ],
    }


def as_csv(results: Results) -> str:
    """A row per arm: mean and half-width of every column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = [key for key, _, _, _ in COLUMNS]
    writer.writerow(["arm", "strategy", "seeds", *(f"{k}{end}" for k in keys for end in ("", "_half"))])
    for arm in results.arms:
        values = [getattr(arm, key) for key in keys]
        cells = [x for v in values for x in (("", "") if v is None else (v.mean, "" if v.half is None else v.half))]
        writer.writerow([arm.arm, arm.strategy, len(arm.seeds), *cells])
    return out.getvalue()


def write(results: Results, folder: Path) -> list[Path]:
    """report.txt, report.md, report.json, report.csv in `folder`."""
    contents = {
        "report.txt": table(results) + "\n",
        "report.md": markdown(results) + "\n",
        "report.json": json.dumps(as_json(results), indent=1) + "\n",
        "report.csv": as_csv(results),
    }
    for name, text in contents.items():
        with atomic_file(folder / name) as stream:
            stream.write(text.encode())
    return [folder / name for name in contents]


# --- pictures -------------------------------------------------------------------------------------------------------


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
    """loss_tokens.png and loss_seconds.png, mean and 95% band of every arm; differences.png, what each gains.

    Raises LabError without matplotlib.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise LabError(f"pictures need matplotlib ({error}): pip install -e '.[lab]'") from None
    e = results.experiment
    made = [_draw_differences(results, folder / "differences.png", pyplot)]
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


def _draw_differences(results: Results, path: Path, pyplot: Any) -> Path:
    """Final loss minus the baseline's: a dot per seed, mean and 95% interval per arm, the best at the top."""
    e = results.experiment
    arms = [arm for arm in results.arms if arm.difference is not None]
    arms.sort(key=lambda arm: arm.difference.mean if arm.difference is not None else 0.0, reverse=True)
    figure, axes = pyplot.subplots(figsize=(7.5, 1.2 + 0.32 * max(1, len(arms))), layout="constrained")
    reach = 0.0
    for y, arm in enumerate(arms):
        found = arm.difference
        assert found is not None
        seeds = [seed for seed in arm.seeds if (e.baseline, seed) in results.runs]
        dots = [
            final_loss(results.runs[arm.arm, s], e.metric) - final_loss(results.runs[e.baseline, s], e.metric)
            for s in seeds
        ]
        reach = max(reach, *(abs(x) for x in (*dots, found.mean)))
        clear = found.half is not None and abs(found.mean) > found.half
        colour = ("tab:blue" if found.mean < 0 else "tab:red") if clear else "gray"
        axes.errorbar([found.mean], [y], xerr=[found.half or 0.0], fmt="o", color=colour, capsize=3)
        axes.plot(dots, [y] * len(dots), "|", color="black", alpha=0.6)
    axes.axvline(0.0, color="black", linestyle="--", linewidth=1)
    if reach:  # an interval over two seeds is wider than what matters
        axes.set_xlim(-1.6 * reach, 1.6 * reach)
    axes.set_yticks(range(len(arms)), [f"{arm.arm} ({len(arm.seeds)})" for arm in arms])
    axes.set(xlabel=f"final loss on {', '.join(e.metric)} minus {e.baseline}'s, nats; left is better", title=e.name)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
