"""The sections of a page: which text, tables, panels and documents stand in each, or why there are none.

Nothing is drawn and nothing is escaped here; `page.py` does both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml

from megatron_opus.data.corpus import CorpusError
from megatron_opus.report import documents, panels, tables
from megatron_opus.report.decisions import Decisions
from megatron_opus.report.documents import ListedDocument, Source
from megatron_opus.report.pictures import Panel
from megatron_opus.report.record import EVALUATION_FILE, LEDGER, RunRecord
from megatron_opus.report.tables import Table

MOST_LISTED, MOST_WITHIN = 6, 3  # documents at each end: of all, and within a domain


@dataclass(kw_only=True)
class Group:
    """Panels under one heading. legend: whether a line stands for a run."""

    title: str = ""
    text: str = ""
    panels: list[Panel]
    legend: bool = True


@dataclass(kw_only=True)
class Documents:
    run: int
    text: str
    most: list[ListedDocument]
    least: list[ListedDocument]
    domains: list[tuple[str, list[ListedDocument], list[ListedDocument]]]


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """The beginning of a document's text, under a line that says what it is."""

    domain: str
    line: str
    text: str
    cut: bool


@dataclass(kw_only=True)
class Excerpts:
    """Columns of excerpts beside each other: heading, documents."""

    title: str
    columns: list[tuple[str, list[Excerpt]]]


@dataclass(kw_only=True)
class PageSection:
    id: str
    title: str
    text: list[str] = field(default_factory=list)
    notes: list[tuple[str, list[str]]] = field(default_factory=list)  # run, sentences
    tables: list[Table] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    documents: list[Documents] = field(default_factory=list)
    excerpts: list[Excerpts] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)  # title, content


def compose(
    records: Sequence[RunRecord],
    decisions: Sequence[Decisions | None],
    sources: Sequence[Source],
    command: str,
) -> list[PageSection]:
    """All sections of the page, in order; those without content say why or are left out."""
    counts = [tables.degradations(r, d) for r, d in zip(records, decisions, strict=True)]
    goal = tables.goal(records, sources)
    targets = () if goal is None else goal.domains if any(s.targets for s in sources) else ()
    sections = [
        _summary(records, decisions, sources, goal, counts),
        _settings(records),
        _losses(records, targets),
        _domains(records, decisions),
        _utility(records, decisions),
        _draw(records),
        _overhead(records),
        _documents(records, decisions, sources),
        _benchmarks(records),
        PageSection(
            id="degraded",
            title="What degraded",
            text=[] if any(sum(c.values()) for c in counts) else ["Nothing: every count is zero."],
            tables=[tables.degraded(records, counts)],
        ),
        _environment(records, command),
    ]
    return [s for s in sections if s is not None]


def _summary(
    records: Sequence[RunRecord],
    decisions: Sequence[Decisions | None],
    sources: Sequence[Source],
    goal: tables.Goal | None,
    counts: Sequence[dict[str, int]],
) -> PageSection:
    section = PageSection(id="summary", title="Summary")
    for record, found, source in zip(records, decisions, sources, strict=True):
        lines = [*record.notes, *source.notes, *_ledger_notes(record, found)]
        if lines:
            section.notes.append((record.label, lines))
    tokens = {r.last("update_tokens") for r in records if len(r)}
    if len(tokens) > 1:
        section.text.append(
            "The runs were trained on different numbers of tokens: compare the curves at equal tokens, not the final "
            "losses."
        )
    section.tables.append(tables.summary(records, goal, [sum(c.values()) for c in counts]))
    if (table := tables.final_losses(records, goal.domains if goal else ())) is not None:
        section.tables.append(table)
    return section


def _ledger_notes(record: RunRecord, found: Decisions | None) -> list[str]:
    if found is None:
        if not (record.directory / LEDGER).exists():
            return ["So nothing is shown of utilities, of what was offered and of single documents."]
        return [
            f"No part of {LEDGER}/ has a row that can be read yet (they are written with every checkpoint): nothing "
            "is shown of utilities, of what was offered and of single documents."
        ]
    lines = list(found.notes)
    if len(record) and found.last < record.step[-1]:
        lines.append(
            f"The ledger ends at step {found.last:,}, {int(record.step[-1]) - found.last:,} before the metrics: its "
            "parts are written with every checkpoint and at the end."
        )
    return lines


def _settings(records: Sequence[RunRecord]) -> PageSection | None:
    if len(records) < 2:
        return None
    table = tables.differing_settings(records)
    text = [] if table.rows else ["None: the runs have the same settings."]
    return PageSection(id="settings", title="Settings that differ", text=text, tables=[table] if table.rows else [])


def _losses(records: Sequence[RunRecord], targets: Sequence[str]) -> PageSection:
    section = PageSection(id="loss", title="Loss")
    clock = "Seconds of the steps, scoring included; evaluation, checkpoints and pauses are left out."
    section.groups = [
        Group(title="Validation, at equal update tokens", panels=panels.validation(records, targets, by_clock=False)),
        Group(title="Validation, by wall clock", text=clock, panels=panels.validation(records, targets, by_clock=True)),
        Group(
            title="Training",
            text="The loss is on the sequences that each run chose itself, so it is not comparable between strategies. "
            "Means over bins of steps; band: 10% to 90% of single steps.",
            panels=[*panels.training_loss(records), *panels.diagnostics(records, panels.OPTIMISATION)],
        ),
    ]
    hidden = len(panels.validation_domains(records)) - panels.MOST_DOMAINS
    if hidden > 0:
        section.text.append(f"{hidden} more validation domains are in the table above only.")
    return _with_panels(section, "No losses have been recorded.")


def _domains(records: Sequence[RunRecord], decisions: Sequence[Decisions | None]) -> PageSection:
    section = PageSection(id="domains", title="Domain mix")
    mix = panels.domain_mix(records, decisions)
    text = (
        "Line: share of the sequences that were chosen; dotted: of those that were offered. Means over bins of steps."
    )
    section.groups = [Group(text=text, panels=mix)]
    if (table := tables.domains(records, decisions)) is not None:
        section.tables.append(table)
    return _with_panels(section, "No shares of domains have been recorded.")


def _utility(records: Sequence[RunRecord], decisions: Sequence[Decisions | None]) -> PageSection:
    section = PageSection(id="utility", title="Utility")
    without = [r.label for r, d in zip(records, decisions, strict=True) if d is not None and not d.has_utility]
    if without:
        section.text.append(f"No utilities, by the strategy: {', '.join(without)}.")
    section.groups = [
        Group(
            text="In colour: candidates that were chosen; grey and dashed: that were not. Line: median, band: 10% to "
            "90%. Standardised: in standard deviations of one step's candidates, for the unit changes during a run.",
            panels=panels.utilities(records, decisions),
            legend=False,
        )
    ]
    return _with_panels(section, "" if without else "No utilities have been recorded.")


def _draw(records: Sequence[RunRecord]) -> PageSection:
    section = PageSection(id="draw", title="Draw and redundancy")
    section.groups = [
        Group(
            text="Entropy 1: the first draw of a step is uniform; 0: one candidate takes all. Lines are means over "
            "bins of steps, bands go from 10% to 90% of single steps.",
            panels=panels.diagnostics(records, panels.KNOWN),
        )
    ]
    return _with_panels(section, "These strategies do not draw by utility.")


def _overhead(records: Sequence[RunRecord]) -> PageSection:
    section = PageSection(id="overhead", title="Overhead")
    measured = any(r.column("choose_seconds") is not None for r in records)
    parts = "strong colour: scoring; grey: everything else"
    if measured:
        parts = "strong colour: scoring; light colour: the rest of choosing (buffer, draw, reading); grey: training"
    section.groups = [
        Group(
            title="Seconds of a step",
            text=f"Stacked, means over bins of steps; {parts}. The axis is cut where single steps took far longer.",
            panels=panels.step_seconds(records),
            legend=False,
        ),
        Group(title="Memory and traffic", panels=panels.diagnostics(_without_zeros(records), panels.COST)),
    ]
    if all(r.total("score_bytes_sent") == 0 for r in records):
        section.text.append("Scoring sent no bytes: one process, or no scoring.")
    return _with_panels(section, "No times have been recorded.")


def _without_zeros(records: Sequence[RunRecord]) -> Sequence[RunRecord]:
    """Leaves out traffic where there is none in any run."""
    if any(r.total("score_bytes_sent") for r in records):
        return records
    for record in records:
        record.columns.pop("score_bytes_sent", None)
    return records


def _documents(
    records: Sequence[RunRecord], decisions: Sequence[Decisions | None], sources: Sequence[Source]
) -> PageSection:
    section = PageSection(
        id="documents",
        title="Most and least chosen",
        text=[
            "Ordered by surplus: times chosen, less what the run's overall share of chosen sequences would give for as "
            "many offers. A sequence counts for every document in it. Mean utility: in standard deviations of one "
            "step's candidates. Documents are numbered from 0 within their domain."
        ],
    )
    for run, (record, found, source) in enumerate(zip(records, decisions, sources, strict=True)):
        if found is not None:
            section.documents.append(_ends(run, record, found, source))
    if not section.documents:
        section.text = ["The runs have no ledger that could be read."]
    return section


def _ends(run: int, record: RunRecord, found: Decisions, source: Source) -> Documents:
    corpus, said = source.corpus, ""
    rate = float(found.chosen.sum() / found.offered.sum())
    try:
        ranking = documents.rank(found.tally, found.domains, rate, corpus)
    except CorpusError as error:
        corpus, said = None, f"Texts are not shown, for the ledger does not fit the corpus: {error} "
        ranking = documents.rank(found.tally, found.domains, rate, None)
    if not found.has_utility:
        said += "Drawn without utilities: what is chosen more often than other documents is so by chance."

    def listed(count: int, domain: str | None = None) -> tuple[list[ListedDocument], list[ListedDocument]]:
        most, least = documents.ends(ranking, count, domain)
        return documents.choices(ranking, most, corpus), documents.choices(ranking, least, corpus)

    most, least = listed(MOST_LISTED)
    within = [(name, *listed(MOST_WITHIN, name)) for name in found.domains] if found.has_utility else []
    return Documents(
        run=run,
        text=f"{len(ranking.key):,} {'documents' if corpus else 'sequences'} were offered. {said}",
        most=most,
        least=least,
        domains=[entry for entry in within if entry[1]],
    )


def _benchmarks(records: Sequence[RunRecord]) -> PageSection:
    section = PageSection(id="benchmarks", title="Benchmarks", tables=tables.benchmarks(records))
    without = [r.label for r in records if r.evaluation is None]
    if without:
        section.text.append(f"No {EVALUATION_FILE}: {', '.join(without)}.")
    elif not section.tables:
        section.text.append(f"{EVALUATION_FILE} holds neither benchmarks nor perplexities.")
    return section


def _environment(records: Sequence[RunRecord], command: str) -> PageSection:
    markers = [documents.newest_marker(r.directory) for r in records]
    table = tables.environment(records, markers)
    section = PageSection(id="environment", title="Settings and environment", tables=[table] if table.rows else [])
    without = [r.label for r, marker in zip(records, markers, strict=True) if marker is None]
    if without:
        section.text.append(f"No checkpoint that says which versions wrote it: {', '.join(without)}.")
    for record in records:
        if record.settings:
            content = yaml.safe_dump(record.settings, sort_keys=False, allow_unicode=True)
            section.files.append((f"config.yaml of {record.label}", content))
    section.files.append(("Folders", "\n".join(str(r.directory) for r in records)))
    if command:
        section.files.append(("Command that made this page", command))
    return section


def _with_panels(section: PageSection, otherwise: str) -> PageSection:
    section.groups = [group for group in section.groups if group.panels]
    if not section.groups and otherwise:
        section.text.append(otherwise)
    return section
