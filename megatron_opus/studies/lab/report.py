"""The results of an experiment: intervals over seeds, paired with the baseline by seed, as text, Markdown and JSON.

Loss: the mean of the metric's validation domains at the end of a run, nats per token.

Tokens to target: for one seed, the *target* is the worse of the two final losses, of the arm and of the baseline, which
both curves have reached. The ratio is (update tokens of the arm at the target) / (those of the baseline), each
interpolated on its own curve: for a worse arm on the baseline's, for a better one on the arm's. Below 1 is better.
Seconds to target: the same over the clock of the steps, scoring included, evaluation and checkpoints left out; with
`clock: cpu` over the processor's seconds, which tell the same on a machine of one's own, and the truth on a shared one.
Where the experiment names a file `before`, the clock of an arm begins with what was spent for it before its first step.

Runs of one schedule are compared: in the middle of a run the learning rate has not come down yet, so a better arm
reaches the target later than a run planned for fewer tokens would.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_opus.files import write_text
from megatron_opus.runs.curves import Run, first_reached, read_run
from megatron_opus.studies.lab.experiment import START, Experiment, LabError, PlannedRun
from megatron_opus.studies.lab.intervals import Interval, interval
from megatron_opus.studies.lab.runner import is_finished, why_unfinished
from megatron_opus.studies.lab.sources import source_shares

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
class Contrast:
    """One arm against another, both not the baseline: paired by seed, over the seeds that both finished."""

    arm: str
    other: str
    seeds: list[int]
    difference: Interval | None  # loss minus the other's
    token_ratio: Interval | None
    second_ratio: Interval | None


@dataclass(frozen=True, kw_only=True)
class Results:
    experiment: Experiment
    arms: list[ArmResult]
    contrasts: list[Contrast]
    failed: list[tuple[str, str]]  # run, why: never left out
    added_later: list[str]
    runs: dict[tuple[str, int], Run]
    sources: dict[tuple[str, int], dict[str, float]]  # of what was trained on, where the corpus hides them


def collect(experiment: Experiment, planned: Sequence[PlannedRun], record: Mapping[str, Any]) -> Results:
    """Read every finished run. Raises LabError when the metric's domains are not among those evaluated."""
    before = _seconds_before(experiment)
    runs = {
        (p.arm, p.seed): _later(read_run(p.directory), before.get(p.arm, 0.0))
        for p in planned
        if p.arm != START and is_finished(p)
    }
    for run in runs.values():
        missing = [d for d in experiment.metric if d not in run.curves]
        if missing:
            raise LabError(f"metric: {run.name} evaluated {', '.join(run.curves)}, not {', '.join(missing)}")
    return Results(
        experiment=experiment,
        arms=[_arm(experiment, arm, runs) for arm in experiment.arms],
        contrasts=[_contrast(experiment, arm, other, runs) for arm, other in experiment.contrasts],
        failed=[(p.name, why_unfinished(p)) for p in planned if not is_finished(p)],
        added_later=list(record["added_later"]),
        runs=runs,
        sources={
            (p.arm, p.seed): shares
            for p in planned
            if (p.arm, p.seed) in runs and (shares := source_shares(p.directory, p.config))
        },
    )


def _seconds_before(experiment: Experiment) -> dict[str, float]:
    """Arm -> seconds of the experiment's clock that were spent for it before its first step."""
    if experiment.before is None:
        return {}
    try:
        raw = json.loads(experiment.before.read_text(encoding="utf-8"))
        found = {str(arm): float(seconds) for arm, seconds in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LabError(f"before: {experiment.before}: expected JSON, arm -> seconds ({error})") from error
    if unknown := [arm for arm in found if arm not in experiment.arms]:
        raise LabError(f"before: {experiment.before}: expected arms of the experiment, got {', '.join(unknown)}")
    return found


def _later(run: Run, seconds: float) -> Run:
    """Let the clocks of a run begin `seconds` earlier."""
    return dataclasses.replace(
        run, clock=[s + seconds for s in run.clock], cpu_clock=[s + seconds for s in run.cpu_clock]
    )


def _arm(experiment: Experiment, arm: str, runs: Mapping[tuple[str, int], Run]) -> ArmResult:
    clock = experiment.clock
    mine = {seed: runs[arm, seed] for seed in experiment.seeds if (arm, seed) in runs}
    pairs = [] if arm == experiment.baseline else list(_pairs(experiment, arm, experiment.baseline, runs).values())
    difference, token_ratio, second_ratio = _against(experiment, pairs)
    return ArmResult(
        arm=arm,
        strategy=next((run.strategy for run in mine.values()), ""),
        seeds=list(mine),
        loss=interval([final_loss(run, experiment.metric) for run in mine.values()]),
        difference=difference,
        token_ratio=token_ratio,
        second_ratio=second_ratio,
        overhead=interval([(_clock(a, clock)[-1] / a.steps) / (_clock(b, clock)[-1] / b.steps) - 1 for a, b in pairs]),
        scoring_share=interval([run.score_seconds / run.seconds for run in mine.values()]),
    )


def _contrast(experiment: Experiment, arm: str, other: str, runs: Mapping[tuple[str, int], Run]) -> Contrast:
    pairs = _pairs(experiment, arm, other, runs)
    difference, token_ratio, second_ratio = _against(experiment, list(pairs.values()))
    return Contrast(
        arm=arm,
        other=other,
        seeds=list(pairs),
        difference=difference,
        token_ratio=token_ratio,
        second_ratio=second_ratio,
    )


def _pairs(
    experiment: Experiment, arm: str, other: str, runs: Mapping[tuple[str, int], Run]
) -> dict[int, tuple[Run, Run]]:
    """By seed, for the seeds that both arms finished."""
    return {
        seed: (runs[arm, seed], runs[other, seed])
        for seed in experiment.seeds
        if (arm, seed) in runs and (other, seed) in runs
    }


def _against(
    experiment: Experiment, pairs: Sequence[tuple[Run, Run]]
) -> tuple[Interval | None, Interval | None, Interval | None]:
    """Difference of the final losses, ratio of tokens to target, ratio of seconds to target."""
    metric, clock = experiment.metric, experiment.clock
    return (
        interval([final_loss(a, metric) - final_loss(b, metric) for a, b in pairs]),
        interval([ratio_to_target(by_tokens(a, metric), by_tokens(b, metric)) for a, b in pairs]),
        interval([ratio_to_target(by_seconds(a, metric, clock), by_seconds(b, metric, clock)) for a, b in pairs]),
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


# --- text and JSON --------------------------------------------------------------------------------------------------

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


def contrast_cells(results: Results) -> list[list[str]]:
    """The title row and a row per contrast; nothing without any."""
    columns = [c for c in COLUMNS if c[0] in ("difference", "token_ratio", "second_ratio")]
    rows = [["contrast", "seeds", "difference", *(title for _, title, _, _ in columns[1:])]]
    for found in results.contrasts:
        values = [getattr(found, key) for key, _, _, _ in columns]
        texts = ["" if v is None else v.text(d, s) for v, (_, _, d, s) in zip(values, columns, strict=True)]
        rows.append([f"{found.arm} minus {found.other}", f"{len(found.seeds)}/{len(results.experiment.seeds)}", *texts])
    return rows if len(rows) > 1 else []


def markdown(results: Results) -> str:
    """The tables of arms and contrasts; a difference whose interval leaves out 0 is bold."""
    tables = []
    rows, column = cells(results), 2 + [key for key, _, _, _ in COLUMNS].index("difference")
    for cell_rows, place, found in (
        (rows, column, [arm.difference for arm in results.arms]),
        (contrast_cells(results), 2, [contrast.difference for contrast in results.contrasts]),
    ):
        if not cell_rows:
            continue
        for row, difference in zip(cell_rows[1:], found, strict=True):
            if difference is not None and difference.clear:
                row[place] = f"**{row[place]}**"
        lines = (cell_rows[0], ["---"] * len(cell_rows[0]), *cell_rows[1:])
        tables.append("\n".join("| " + " | ".join(row) + " |" for row in lines))
    return "\n\n".join(tables)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(results: Results) -> str:
    """What was announced, a line per arm and contrast, and every run that is missing with the reason."""
    e = results.experiment
    lines = [
        f"experiment     {e.name}",
        f"hypothesis     {' '.join(e.hypothesis.split())}",
        f"metric         loss on {', '.join(e.metric)} at the end, nats per token",
        f"stopping rule  {' '.join(e.stopping_rule.split())}",
        f"baseline       {e.baseline}; mean ± half of the 95% t-interval over seeds; ratios below 1: it needs less",
        f"clock          {'processor seconds of the run' if e.clock == 'cpu' else 'wall clock'}, evaluation left out",
        "",
        *_aligned(cells(results)),
    ]
    if results.contrasts:
        lines += ["", *_aligned(contrast_cells(results))]
    if results.sources:
        lines += ["", "of the trained sequences, by what the corpus hides (mean over seeds):", *_source_lines(results)]
    if results.failed:
        lines += ["", "not finished, and not in the table:", *(f"  {name}: {why}" for name, why in results.failed)]
    if results.added_later:
        lines += ["", f"added after the experiment was announced: {', '.join(results.added_later)}"]
    return "\n".join(lines)


def _source_lines(results: Results) -> list[str]:
    names = sorted({name for shares in results.sources.values() for name in shares})
    rows = [["arm", *names]]
    for arm in results.experiment.arms:
        found = [shares for (of, _), shares in results.sources.items() if of == arm]
        if found:
            rows.append([arm, *(f"{math.fsum(s.get(n, 0.0) for s in found) / len(found):.3f}" for n in names)])
    return _aligned(rows)


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
        "contrasts": [asdict(contrast) for contrast in results.contrasts],
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
                "selected_share": run.selected_share,
                "source_share": results.sources.get((arm, seed), {}),
                "entropy_ratio": run.entropy_ratio,
                "largest_gradient": run.largest_gradient,
                "by_tokens": by_tokens(run, metric),
                "cpu_seconds": run.cpu_clock[-1] if run.cpu_clock else None,
                "by_seconds": by_seconds(run, metric, e.clock),
            }
            for (arm, seed), run in results.runs.items()
        ],
    }


def write(results: Results, folder: Path) -> list[Path]:
    """Write report.txt, report.md and report.json into `folder`; return their paths."""
    contents = {
        "report.txt": table(results) + "\n",
        "report.md": markdown(results) + "\n",
        "report.json": json.dumps(as_json(results), indent=1) + "\n",
    }
    for name, text in contents.items():
        write_text(folder / name, text)
    return [folder / name for name in contents]
