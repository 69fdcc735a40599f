"""The report as a whole: numbers against those worked out by hand, what a page must not contain, what is missing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import NASTY, STEPS, K, N, make_corpus, mark, write_run

from megatron_opus.report.record import ReportError

pytest.importorskip("matplotlib", reason="the report needs the extra `lab`")

from megatron_opus.report.page import collect, notes, write_report

NAME = "opus & <b>co"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("report_corpus"))


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """random without utilities, and opus, whose losses are 0.5 lower."""
    root = tmp_path_factory.mktemp("report_runs")
    write_run(root / "random", corpus, strategy="random", scored=False)
    write_run(root / "opus", corpus, offset=-0.5)
    (root / "opus").rename(root / NAME)
    arc = {"accuracy": 0.25, "accuracy_norm": 0.3, "n": 40, "stderr": 0.07, "random_baseline": 0.25, "truncated": 3}
    evaluation = {
        "checkpoint": "step_00000012",
        "benchmarks": {"arc": arc, "new": {"accuracy": 1.0, "accuracy_norm": None, "n": 1, "stderr": None}},
        "average": 0.625,
        "in_domain_average": None,
        "perplexity": {"goal": {"loss": 2.0, "perplexity": 7.389, "tokens": 1234}},
        "settings": {"num_fewshot": 0, "limit": None},
    }
    (root / "random/evaluation.json").write_text(json.dumps(evaluation))
    return [root / "random", root / NAME]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("report_page") / "report.html"
    write_report(runs, output, command="the <command>")
    return output.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Tables as rows of text, all attributes, and a check that elements close in the order in which they open."""

    VOID = ("meta", "line", "path", "use", "rect", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.names: set[str] = set()
        self.sections: set[str] = set()
        self._open: list[str] = []
        self._cell = False
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "section":
            self.sections.add(dict(attrs)["id"] or "")
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data.strip()


def test_numbers_are_those_of_the_record(page: str) -> None:
    """Guards against a wrong row, a swapped run, a mean over the wrong steps: from support/report_runs.py."""
    rows = {row[0]: row[1:] for row in Reader(page).rows}
    last = 4.0 - 0.2 * (STEPS - 1)
    assert rows["strategy"] == ["random", "opus"]
    assert rows["steps recorded"] == ["12 of 12"] * 2
    assert rows["chosen of offered, per step"] == [f"{K} of {N}"] * 2
    assert rows["update tokens"] == ["768", "768"]
    assert rows["final loss on goal, nats per token"] == [f"{last:.4f}", f"{last - 0.5:.4f}"]
    assert rows["minus random"] == ["–", "-0.5000"]
    # evaluations after 4, 8, 12 steps: random ends at 1.8, which opus passes between 2.1 and 1.3 at (2.1 - 1.8) / 0.8
    needed = (8 + 4 * (2.1 - 1.8) / 0.8) / 12
    assert rows["update tokens needed for random's final loss"] == ["–", f"{needed:.0%}"]
    assert rows["seconds of all steps"] == ["15.0", "15.0"]
    assert rows["seconds per step, mean"] == ["1.250", "1.250"]
    assert rows["share of the steps' seconds in scoring"] == ["20.0%"] * 2
    assert rows["seconds per step against random, mean"] == ["–", "+0.0%"]
    assert rows["other"] == ["3.0000", "2.5000 (-0.5000)"]
    assert rows["steps in which selection fell back to random"] == ["1", "1"]
    assert rows["updates skipped for a NaN or Inf gradient"] == ["1", "1"]
    assert rows["candidates excluded for non-finite scores"] == ["12", "12"]
    assert rows["candidates excluded for a non-finite factors"] == ["0", "12"]
    assert rows["degraded (see below)"] == ["17", "26"]
    assert rows["selection.strategy"] == ["random", "opus"]
    assert rows["arc"] == ["0.250 ± 0.070 (0.300; n 40)", "–", "0.250"]
    assert rows["new"] == ["1.000 (n 1)", "–", "–"]
    assert rows["average of the benchmarks above"] == ["0.625", "–", ""]
    assert rows["settings.limit"] == ["null", "–"]
    assert rows["checkpoint"] == ["step_00000012", "–"]
    assert rows["questions of arc that were cut to the model's length"] == ["3", "0"]
    assert rows["goal"] == ["2.0000 (7.39; 1,234 tokens)", "–"]
    assert rows["torch"] == ["9.9.9", "9.9.9"]
    assert rows["device"] == ["an abacus", "an abacus"]
    assert rows["world_size"] == ["2", "2"]
    assert "NVTE_FLASH_ATTN" not in rows
    assert rows["steps scored in the geometry adamw-separable"] == ["12", "12"]


def test_every_section_is_there_and_linked(page: str) -> None:
    """Guards against a section of the request that silently falls away, and a contents list that leads nowhere."""
    found = Reader(page)
    assert found.sections == {
        "summary", "settings", "loss", "domains", "utility", "draw", "overhead", "documents", "benchmarks", "degraded",
        "environment",
    }  # fmt: skip
    assert {value[1:] for tag, name, value in found.attributes if tag == "a" and name == "href"} == found.sections
    titles = re.findall(r'aria-label="([^"]*)"', page)
    for expected in (
        "goal (target): nats per token against update tokens",
        "goal (target): nats per token against sec",
    ):
        assert any(title.startswith(expected) for title in titles), expected
    for part in (
        "Entropy of the draw",
        "seconds of a step",
        "standardised utility",
        "Training loss",
        "Learning rate",
        "Memory of rank",
    ):
        assert any(part in title for title in titles), part


def test_texts_are_shown_and_never_obeyed(page: str) -> None:
    """Guards against a document, a run's name or a setting that becomes part of the page."""
    found = Reader(page)
    assert not found.names & {"script", "img", "iframe", "object", "embed", "link", "b/", "base", "form"}
    assert not [a for a in found.attributes if a[1].startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "opus &amp; &lt;b&gt;co" in page
    assert "the &lt;command&gt;" in page
    assert NASTY not in page
    assert "\u202e" not in page  # it would turn the text after it


def test_nothing_is_fetched(page: str) -> None:
    """Guards against a style, font, picture or namespace from elsewhere: the file must do alone, and offline."""
    found = Reader(page)
    targets = [value for _, name, value in found.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert targets
    assert all(value.startswith("#") for value in targets)
    assert not re.search(r"@import|xmlns", page)
    assert all(inside.startswith("#") for inside in re.findall(r"url\(([^)]*)\)", page))
    texts = re.sub(r"&lt;img src=http://example.org/x.png", "", page)  # of the documents, escaped
    assert "http:" not in texts
    assert "https:" not in texts
    policy = [value for tag, name, value in found.attributes if tag == "meta" and name == "content"]
    assert "default-src 'none'; style-src 'unsafe-inline'" in policy


def test_ids_are_unique(page: str) -> None:
    """Guards against a panel that is clipped by another panel's frame."""
    ids = [value for _, name, value in Reader(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", page))
    assert used
    assert used <= set(ids)


def test_the_same_input_gives_the_same_bytes(page: str, runs: list[Path], tmp_path: Path) -> None:
    """Guards against times, random ids and the user's own matplotlib settings in the file."""
    import matplotlib as mpl

    with mpl.rc_context({"lines.linewidth": 7.0, "xtick.labelsize": 20.0, "svg.fonttype": "path"}):
        write_report(runs, tmp_path / "again.html", command="the <command>")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def notes_of(run: Path, data: Path | None = None) -> str:
    return "\n".join(notes(collect([run], data=data)[1]))


def test_one_run(runs: list[Path], tmp_path: Path) -> None:
    """Guards against a page that compares a run with itself."""
    assert write_report(runs[1:], tmp_path / "r.html") == []
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Settings that differ" not in text
    assert "needed for" not in text
    assert "minus " not in "".join(cell for row in Reader(text).rows for cell in row)


def test_a_run_that_was_killed_and_resumed(corpus: Path, tmp_path: Path) -> None:
    """Guards against steps that count twice, and against a torn line or an overlap of the ledger taken in silence."""
    directory = tmp_path / "run"
    write_run(
        directory, corpus, planned=20, changes={7: {"loss": float("nan")}, 11: {"validation_loss": {"goal": 9.0}}}
    )
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines[:10], *lines[8:], '{"step": 12, "lo']))
    parts = sorted((directory / "ledger").iterdir())
    shutil.copy(parts[0], directory / "ledger/steps-00000002-00000004.parquet")
    said = "\n".join(write_report([directory], tmp_path / "r.html"))
    assert "Recorded up to step 12 of 20" in said
    assert "2 rows of metrics.jsonl belong to steps that were taken again" in said
    assert "is torn" in said
    assert f"{5 * N} rows of steps that two parts of the ledger cover are counted once" in said
    rows = {row[row[0] == "run"]: row[1:] for row in Reader((tmp_path / "r.html").read_text()).rows}
    assert rows["steps recorded"] == ["12 of 20"]
    assert rows["seconds of all steps"] == ["15.0"]
    assert rows["steps with a non-finite training loss"] == ["1"]
    assert rows["final loss on goal, nats per token"] == ["9.0000"]
    assert int(rows["web"][1]) + int(rows["code"][1]) == STEPS * N


def test_what_is_missing_is_said(corpus: Path, tmp_path: Path) -> None:
    """Guards against a page that looks whole where half of the run is gone."""
    directory = tmp_path / "run"
    write_run(directory, corpus, strategy="random", scored=False)
    shutil.rmtree(directory / "checkpoints")
    assert "could not be checked" in notes_of(directory)
    mark(directory, "another")
    assert "is not the data that this run was trained on" in notes_of(directory)
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus, moved)
    text = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(text.replace(str(corpus), "gone"))
    assert "The corpus (gone) is not where the settings say" in notes_of(directory)
    shutil.rmtree(directory / "checkpoints")
    assert "could not be checked" in notes_of(directory, moved)
    part = min((directory / "ledger").iterdir())
    part.write_bytes(part.read_bytes()[:100])
    assert "steps-00000000-00000004.parquet cannot be read, so its steps 0 to 4" in notes_of(directory)
    shutil.rmtree(directory / "ledger")
    (directory / "config.yaml").unlink()
    (directory / "evaluation.json").write_text("[")
    said = write_report([directory], tmp_path / "r.html")
    for expected in (
        "config.yaml is missing",
        "ledger is missing",
        "evaluation.json cannot be read",
        "nothing is shown",
    ):
        assert any(expected in line for line in said), expected
        assert expected in (tmp_path / "r.html").read_text()


def test_a_ledger_alone(corpus: Path, tmp_path: Path) -> None:
    """Guards against a traceback for a run whose metrics are lost."""
    write_run(tmp_path / "run", corpus)
    (tmp_path / "run/metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in notes_of(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("")
    assert "holds no complete row" in notes_of(tmp_path / "run")


def test_rows_with_little_in_them(tmp_path: Path) -> None:
    """Guards against a traceback for the record of another version, which lacks names or has others."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"step": s, "loss": 1.0, "new": s, "validation_loss": {"x": 3.0 - s}} for s in range(3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    rows = {row[0]: row[1:] for row in Reader(text).rows}
    assert rows["final mean loss of x (the target is unknown), nats per token"] == ["1.0000", "1.0000"]
    assert rows["update tokens needed for a's final loss"] == ["–", "–"]
    assert rows["update tokens"] == ["–", "–"]


def test_what_cannot_be_reported_is_refused(runs: list[Path], tmp_path: Path) -> None:
    """Guards against an empty page with status 0, and against a report written over a run's own file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    for folders, expected in (
        ([tmp_path / "none"], "found nothing"),
        ([tmp_path / "empty"], "found an empty folder"),
        ([tmp_path / "broken"], "line 2: not a row of metrics"),
        ([runs[0], runs[0]], "got it 2 times"),
        ([tmp_path / str(run) for run in range(8)], "at most 7 runs"),
    ):
        with pytest.raises(ReportError, match=expected):
            write_report(folders, tmp_path / "r.html")
    with pytest.raises(ReportError, match="is no report"):
        write_report(runs, runs[0] / "metrics.jsonl")
    with pytest.raises(ReportError, match="existing folder"):
        write_report(runs, tmp_path / "no/r.html")
    assert not (tmp_path / "r.html").exists()


def test_runs_of_one_name(corpus: Path, tmp_path: Path) -> None:
    """Guards against two runs that a page cannot tell apart."""
    for folder in ("a", "b"):
        write_run(tmp_path / folder / "run", corpus)
    records, sections = collect([tmp_path / "a/run", tmp_path / "b/run"])
    assert [record.label for record in records] == ["a/run", "b/run"]
    assert sections[0].tables[0].head == ["", "a/run", "b/run"]
