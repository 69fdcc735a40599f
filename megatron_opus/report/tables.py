"""The tables of a page as rows of text: what is compared, what differs, what degraded, what it ran on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_opus.nested import flatten
from megatron_opus.report.decisions import Decisions
from megatron_opus.report.documents import Source
from megatron_opus.report.panels import buffer_size, validation_domains
from megatron_opus.report.record import VALIDATION, RunRecord
from megatron_opus.runs.curves import first_reached

NONE = "–"
EVALUATED = ("checkpoint", "step", "average_of", "settings", "lm_eval_version", "transformers_version")


@dataclass(kw_only=True)
class Table:
    """`head` names the columns; cells of the columns from `numbers` on are set right. runs: columns that are runs."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    numbers: int = 1
    runs: dict[int, int] = field(default_factory=dict)  # column -> run, for its colour
    wrap: bool = False  # cells may be long


def per_run(
    records: Sequence[RunRecord], title: str, rows: list[list[str]], caption: str = "", wrap: bool = False
) -> Table:
    """A column for each run."""
    return Table(
        head=[title, *(r.label for r in records)],
        rows=rows,
        caption=caption,
        runs={i + 1: i for i in range(len(records))},
        wrap=wrap,
    )


def text(value: float | None, digits: int = 4, sign: bool = False) -> str:
    if value is None:
        return NONE
    return f"{value:{'+' if sign else ''},.{digits}f}" if math.isfinite(value) else "not finite"


def percent(value: float | None, sign: bool = False) -> str:
    return NONE if value is None else (f"{value:{'+' if sign else ''}.1%}" if math.isfinite(value) else "not finite")


def count(value: float | None) -> str:
    return NONE if value is None else f"{round(value):,}"


# --- losses ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What runs are compared by: the mean over these validation domains."""

    domains: tuple[str, ...]
    name: str


def goal(records: Sequence[RunRecord], sources: Sequence[Source]) -> Goal | None:
    """The targets that the corpus names, where every run with an evaluation has evaluated them; else all in common."""
    evaluated = [r for r in records if len(r.evaluated)]
    if not evaluated:
        return None
    common = [d for d in validation_domains(evaluated) if all(d in r.named(VALIDATION) for r in evaluated)]
    if not common:
        return None
    targets = [d for d in common if any(d in source.targets for source in sources)]
    if targets:
        return Goal(domains=tuple(targets), name=f"loss on {', '.join(targets)}")
    return Goal(domains=tuple(common), name=f"mean loss of {', '.join(common)} (the target is unknown)")


def goal_curve(record: RunRecord, wanted: Goal, x: np.ndarray) -> list[tuple[float, float]]:
    """(x, mean loss of the goal's domains) at every evaluation."""
    curves = [record.curve(domain, x) for domain in wanted.domains]
    return [(points[0][0], math.fsum(p[1] for p in points) / len(points)) for points in zip(*curves, strict=True)]


def final(record: RunRecord, wanted: Goal | None) -> float | None:
    return goal_curve(record, wanted, record.seconds)[-1][1] if wanted and len(record.evaluated) else None


def reached(record: RunRecord, first: RunRecord, wanted: Goal, x: Callable[[RunRecord], np.ndarray]) -> str:
    """What a run needed for the first run's final loss, as a share of what that needed."""
    if not len(record.evaluated) or not len(first.evaluated):
        return NONE
    target = goal_curve(first, wanted, x(first))[-1][1]
    mine = first_reached(goal_curve(record, wanted, x(record)), target)
    theirs = first_reached(goal_curve(first, wanted, x(first)), target)
    if not theirs or not math.isfinite(target) or not math.isfinite(theirs):
        return NONE
    return "never" if mine is None else f"{mine / theirs:.0%}"


def summary(records: Sequence[RunRecord], wanted: Goal | None, degraded: Sequence[int]) -> Table:
    first = records[0]
    mean = [_seconds(r, np.nanmean) for r in records]
    median = [_seconds(r, np.nanmedian) for r in records]
    share = [_share(r) for r in records]
    rows = [
        ["strategy", *(r.strategy for r in records)],
        ["steps recorded", *(_progress(r) for r in records)],
        ["chosen of offered, per step", *(_k_of_n(r) for r in records)],
        ["update tokens", *(count(r.last("update_tokens")) for r in records)],
    ]
    if wanted is not None:
        finals = [final(r, wanted) for r in records]
        rows.append([f"final {wanted.name}, nats per token", *(text(f) for f in finals)])
        if len(records) > 1:
            differences = [None if f is None or finals[0] is None else f - finals[0] for f in finals[1:]]
            rows.append([f"minus {first.label}", NONE, *(text(d, 4, True) for d in differences)])
            for what, x in (("update tokens", lambda r: r.tokens), ("seconds of steps", lambda r: r.seconds)):
                cells = [reached(r, first, wanted, x) for r in records[1:]]
                rows.append([f"{what} needed for {first.label}'s final loss", NONE, *cells])
    rows += [
        ["seconds of all steps", *(text(float(r.seconds[-1]) if len(r) else None, 1) for r in records)],
        ["seconds per step, mean", *(text(m, 3) for m in mean)],
        ["seconds per step, median", *(text(m, 3) for m in median)],
        ["share of the steps' seconds in scoring", *(percent(s) for s in share)],
    ]
    if len(records) > 1:
        for how, values in (("mean", mean), ("median", median)):
            over = [None if v is None or not values[0] else v / values[0] - 1 for v in values[1:]]
            rows.append([f"seconds per step against {first.label}, {how}", NONE, *(percent(o, True) for o in over)])
    rows.append(["degraded (see below)", *(count(d) for d in degraded)])
    return per_run(records, "", rows)


def _seconds(record: RunRecord, average: Callable[[np.ndarray], Any]) -> float | None:
    values = record.column("step_seconds")
    return None if values is None else float(average(values))


def _share(record: RunRecord) -> float | None:
    total = record.total("step_seconds")
    return record.total("score_seconds") / total if total else None


def _progress(record: RunRecord) -> str:
    planned = record.setting("training.train_steps")
    return f"{len(record):,} of {planned:,}" if isinstance(planned, int) else f"{len(record):,}"


def _k_of_n(record: RunRecord) -> str:
    k, n = record.setting("training.global_batch_size"), buffer_size(record)
    return f"{k:,} of {n:,.0f}" if isinstance(k, int) and n is not None else NONE


def final_losses(records: Sequence[RunRecord], targets: Sequence[str]) -> Table | None:
    """A row for each validation domain: the final loss, and the difference to the first run."""
    rows = []
    for domain in sorted(validation_domains(records), key=lambda name: name not in targets):
        finals = [_final_of(r, domain) for r in records]
        cells = [text(finals[0])]
        for value in finals[1:]:
            difference = None if value is None or finals[0] is None else value - finals[0]
            cells.append(text(value) + ("" if difference is None else f" ({text(difference, 4, True)})"))
        rows.append([f"{domain} (target)" if domain in targets else domain, *cells])
    caption = "Final validation loss, nats per token"
    if len(records) > 1:
        caption += f"; in brackets minus {records[0].label}"
    return per_run(records, "domain", rows, caption) if rows else None


def _final_of(record: RunRecord, domain: str) -> float | None:
    if domain not in record.named(VALIDATION) or not len(record.evaluated):
        return None
    return float(record.columns[VALIDATION + domain][record.evaluated[-1]])


# --- settings -------------------------------------------------------------------------------------------------------


def flat(node: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted key -> value as text."""
    return {key: _plain(value) for key, value in flatten(node).items()}


def _plain(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "[]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def differing_settings(records: Sequence[RunRecord]) -> Table:
    settings = [flat(r.settings) for r in records]
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = [[key, *(one.get(key, NONE) for one in settings)] for key in keys if len({s.get(key) for s in settings}) > 1]
    return per_run(records, "key", rows, wrap=True)


# --- what degraded ---------------------------------------------------------------------------------------------------


def degradations(record: RunRecord, found: Decisions | None) -> dict[str, int]:
    """Counts of what did not go as it should. Cumulative counters by their last value, others summed."""
    loss, nonfinite_validation = record.columns.get("loss"), 0
    for domain in record.named(VALIDATION):
        nonfinite_validation += int((~np.isfinite(record.columns[VALIDATION + domain][record.evaluated])).sum())
    counts = {
        "steps in which selection fell back to random": record.last("fallbacks") or 0,
        "updates skipped for a NaN or Inf gradient": record.total("skipped"),
        "steps with a non-finite training loss": 0 if loss is None else int((~np.isfinite(loss)).sum()),
        "non-finite or missing validation losses": nonfinite_validation,
        "candidates excluded for non-finite scores": record.last("excluded_total") or 0,
        "sequences owed to a domain's minimum that the buffer lacked": record.total("floors_unsupplied"),
        "sequences above a domain's maximum": record.total("floors_exceeded"),
        "failed fits of a scaling law": record.last("ado_failed_fits") or 0,
        "rows of steps taken again after a resume": record.superseded,
    }
    for name, result in _mapping((record.evaluation or {}).get("benchmarks")).items():
        if truncated := _number(_mapping(result).get("truncated")):
            counts[f"questions of {name} that were cut to the model's length"] = truncated
    if found is not None:
        counts |= {f"candidates excluded for a {reason}": n for reason, n in found.excluded.items() if n}
    return {name: round(n) for name, n in counts.items()}


def degraded(records: Sequence[RunRecord], counts: Sequence[Mapping[str, int]]) -> Table:
    names = dict.fromkeys(name for one in counts for name in one)
    return per_run(records, "count", [[name, *(count(one.get(name, 0)) for one in counts)] for name in names])


# --- domains, benchmarks, environment --------------------------------------------------------------------------------


def domains(records: Sequence[RunRecord], decisions: Sequence[Decisions | None]) -> Table | None:
    rows = []
    for record, found in zip(records, decisions, strict=True):
        if found is None:
            continue
        offered, chosen = found.offered.sum(axis=0), found.chosen.sum(axis=0)
        for d, name in enumerate(found.domains):
            utility = float(found.domain_utility[d])
            rows.append(
                [
                    record.label,
                    name,
                    count(offered[d]),
                    count(chosen[d]),
                    percent(chosen[d] / offered[d] if offered[d] else None),
                    percent(chosen[d] / chosen.sum() if chosen.sum() else None),
                    text(utility, 2, True) if math.isfinite(utility) else NONE,
                    count(_last(record, f"domain_tokens/{name}")),
                    text(_last(record, f"domain_epochs/{name}"), 2),
                ]
            )
    head = ["run", "domain", "offered", "chosen", "of offers", "of the chosen", "mean utility, std"]
    head += ["tokens trained on", "passes offered"]
    caption = "Sequences by domain over the whole ledger"
    return Table(head=head, rows=rows, caption=caption, numbers=2) if rows else None


def _last(record: RunRecord, name: str) -> float | None:
    values = record.column(name)
    return None if values is None else float(values[-1])


def benchmarks(records: Sequence[RunRecord]) -> list[Table]:
    """What `evaluation.json` holds: accuracies with their standard error, and perplexities."""
    found = [(r.evaluation or {}) for r in records]
    tables = []
    named = [_mapping(one.get("benchmarks")) for one in found]
    rows = []
    for name in dict.fromkeys(name for one in named for name in one):
        values = [_mapping(one.get(name)) for one in named]
        baseline = next((_number(v.get("random_baseline")) for v in values if "random_baseline" in v), None)
        rows.append([name, *(_accuracy(v) for v in values), text(baseline, 3)])
    for key, title in (("average", "average of the benchmarks above"), ("in_domain_average", "in-domain average")):
        if any(_number(one.get(key)) is not None for one in found):
            rows.append([title, *(text(_number(one.get(key)), 3) for one in found), ""])
    if rows:
        table = per_run(
            records, "benchmark", rows, "Accuracy ± standard error (length-normalised accuracy; number of questions)"
        )
        table.head.append("chance")
        tables.append(table)
    held = [_mapping(one.get("perplexity")) for one in found]
    rows = []
    for name in dict.fromkeys(name for one in held for name in one):
        rows.append([name, *(_perplexity(_mapping(one.get(name))) for one in held)])
    if rows:
        tables.append(per_run(records, "text", rows, "Loss, nats per token (perplexity; tokens)"))
    how = [flat({key: one[key] for key in EVALUATED if key in one}) for one in found]
    rows = [[name, *(one.get(name, NONE) for one in how)] for name in dict.fromkeys(n for one in how for n in one)]
    if rows and tables:
        tables.append(per_run(records, "how", rows, "Of what, and how", wrap=True))
    return tables


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _accuracy(value: Mapping[str, Any]) -> str:
    accuracy, error = _number(value.get("accuracy")), _number(value.get("stderr"))
    if accuracy is None:
        return NONE
    more = []
    if (normalised := _number(value.get("accuracy_norm"))) is not None:
        more.append(text(normalised, 3))
    if (n := _number(value.get("n"))) is not None:
        more.append(f"n {n:,.0f}")
    return text(accuracy, 3) + ("" if error is None else f" ± {error:.3f}") + (f" ({'; '.join(more)})" if more else "")


def _perplexity(value: Mapping[str, Any]) -> str:
    loss = _number(value.get("loss"))
    if loss is None:
        return NONE
    tokens = _number(value.get("tokens"))
    more = [text(_number(value.get("perplexity")), 2), *([f"{tokens:,.0f} tokens"] if tokens is not None else [])]
    return f"{text(loss)} ({'; '.join(more)})"


def environment(records: Sequence[RunRecord], markers: Sequence[Mapping[str, Any] | None]) -> Table:
    """What the newest checkpoint says it was written by, and how the scores were preconditioned."""
    facts = []
    for record, marker in zip(records, markers, strict=True):
        one: dict[str, str] = {}
        for part in ("environment", "layout", "versions"):
            facts_of_part = flat(_mapping((marker or {}).get(part)))
            one |= {name: value for name, value in facts_of_part.items() if value != "absent"}
        for geometry, steps in sorted(record.geometries.items()):
            if geometry and steps:
                one[f"steps scored in the geometry {geometry}"] = f"{steps:,}"
        facts.append(one)
    names = dict.fromkeys(name for one in facts for name in one)
    return per_run(records, "", [[name, *(one.get(name, NONE) for one in facts)] for name in names])
