"""The page: sections of text, tables and panels from the run folders, rendered into one file without references.

Everything that comes from a run (names, settings, documents) is escaped by the template engine, and the page forbids
itself scripts and network by its own content policy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_opus.files import write_text
from megatron_opus.report import documents, tables
from megatron_opus.report.decisions import scan
from megatron_opus.report.record import LEDGER, ReportError, RunRecord, read_records
from megatron_opus.report.sections import PageSection, compose
from megatron_opus.style import COLOURS

GENERATOR = "megatron_opus report"
TEMPLATE = "page.html"
# no HTML, or (the second line) what turns the direction of the text after it
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")


def write_report(runs: Sequence[Path], output: Path, *, data: Path | None = None, command: str = "") -> list[str]:
    """Write the page about these run folders to `output`; what is missing in them, as sentences for the terminal.

    data: the prepared corpus, where it is no longer where the runs had it. command: shown at the end of the page.
    Raises ReportError where no page can be made; an `output` that is not such a page is not overwritten.
    """
    check_output(output)
    records, sections = collect(runs, data=data, command=command)
    content = render(records, sections)
    write_text(output, content)
    return notes(sections)


def collect(
    runs: Sequence[Path], *, data: Path | None = None, command: str = ""
) -> tuple[list[RunRecord], list[PageSection]]:
    """Everything that `write_report` shows, nothing drawn yet. Raises ReportError."""
    records = read_records(runs)
    decisions = [scan(r.directory / LEDGER) for r in records]
    return records, compose(records, decisions, [documents.find(r, data) for r in records], command)


def notes(sections: Sequence[PageSection]) -> list[str]:
    return [f"{run}: {line}" for section in sections for run, lines in section.notes for line in lines]


def check_output(output: Path) -> None:
    """Raise ReportError for a place where no page can be written, and for a file that is no page of ours."""
    if not output.parent.is_dir():
        raise ReportError(f"--output {output}: expected an existing folder for it, found none; make {output.parent}")
    if output.is_dir():
        raise ReportError(f"--output {output}: expected a file to write, found a folder; add a file name")
    if output.exists():
        with output.open("rb") as stream:
            head = stream.read(2000)
        if GENERATOR.encode() not in head:
            raise ReportError(f"--output {output}: it exists and is no report of this tool; choose another name")


# --- rendering ------------------------------------------------------------------------------------------------------


def render(records: Sequence[RunRecord], sections: Sequence[PageSection]) -> str:
    """The whole file. The same input gives the same text. Raises ReportError without jinja2."""
    one = len(records) == 1
    title = f"Run {records[0].label}" if one else f"Comparison of {len(records)} runs"
    lead = (
        f"{records[0].strategy}, {tables.count(records[0].last('update_tokens'))} update tokens"
        if one
        else f"{', '.join(r.label for r in records)}. Differences are to the first."
    )
    return render_page(title, lead, [r.label for r in records], sections)


def render_page(title: str, lead: str, labels: Sequence[str], sections: Sequence[PageSection]) -> str:
    """Render a page of its own title; `labels` name the lines of its panels. Raises ReportError without jinja2."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ReportError(f"the report needs jinja2 ({error}): pip install -e '.[lab]'") from None
    engine = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    drawn = [
        {
            **vars(section),
            "groups": [
                {
                    **vars(g),
                    "panels": [Markup(p.svg(f"{section.id}{i}-{j}")) for j, p in enumerate(g.panels)],
                    "runs": sorted({run for p in g.panels for run in p.runs}) if len(labels) > 1 and g.legend else [],
                }
                for i, g in enumerate(section.groups)
            ],
        }
        for section in sections
    ]
    return engine.get_template(TEMPLATE).render(
        generator=GENERATOR,
        title=title,
        lead=lead,
        labels=list(labels),
        colours=COLOURS,
        sections=drawn,
    )


def clean(text: str) -> str:
    """Control characters made visible."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
