"""One HTML page about the scores of a corpus: how they lie, which documents have them, what a rule would keep.

In the style of the report on runs: one file without scripts and without references.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opus.corpus_scores.documents import CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.keep import choose
from megatron_opus.corpus_scores.rules import RuleSet, parse_rules
from megatron_opus.corpus_scores.score_files import Scores, read_scores
from megatron_opus.files import write_text
from megatron_opus.report.page import check_output, render_page
from megatron_opus.report.pictures import Panel, number
from megatron_opus.report.sections import Excerpt, Excerpts, Group, PageSection
from megatron_opus.report.tables import Table, count, percent, text
from megatron_opus.style import MOST_LINES

RULES = ("top", "gumbel:0.5", "band:0.1-0.9", "per-domain:top")
_BINS, _SHOWN, _EXCERPT_TOKENS, _EXCERPT_CHARACTERS = 50, 4, 400, 900


def write_score_page(
    corpus: CorpusDocuments,
    directories: Mapping[str, Path],
    output: Path,
    *,
    rules: Sequence[str] = (),
    share: float = 0.5,
    command: str = "",
) -> None:
    """Write the page about the scorings `directories` (name -> directory of score-corpus) of one corpus.

    rules: what each would keep is shown, of `share` of the tokens; none: the usual ones of every scoring. Raises
    ScoreError for scores of another corpus and rules that cannot be, ReportError where no page can be made.
    """
    check_output(output)
    if not 0.0 < share <= 1.0:
        raise ScoreError(f"share: expected a number above 0 and at most 1, got {share}")
    scores = {name: read_scores(directory, corpus) for name, directory in directories.items()}
    if not scores:
        raise ScoreError("scores: expected at least one directory of score-corpus, got none (--scores)")
    sections = [
        _summary(corpus, scores),
        _histograms(corpus, scores),
        _kept(corpus, scores, [*rules] or _usual(list(scores)), share),
        *(_documents(corpus, name, found) for name, found in scores.items()),
        _settings(scores, command),
    ]
    if len(scores) > 1:
        sections.insert(2, _agreement(corpus, scores))
    names = [entry.name for entry in corpus.entries][:MOST_LINES]
    title = f"Scores: {', '.join(scores)}"
    documents = sum(entry.documents for entry in corpus.entries)
    lead = f"{documents:,} documents in {len(corpus.entries)} domains of {corpus.directory}"
    write_text(output, render_page(title, lead, names, sections))


def whole(corpus: CorpusDocuments, scores: Scores) -> np.ndarray:
    """Return [documents] float64, the scores of all domains in their order."""
    return np.concatenate([scores.of[entry.name] for entry in corpus.entries]).astype(np.float64)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's correlation of two scorings [n] over the documents that both have scored; NaN for none."""
    from scipy.stats import rankdata

    known = np.isfinite(one) & np.isfinite(other)
    ranks = [rankdata(values[known]) for values in (one, other)]
    if known.sum() < 2 or any(r.std() == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


# --- sections -------------------------------------------------------------------------------------------------------


def _summary(corpus: CorpusDocuments, scores: Mapping[str, Scores]) -> PageSection:
    rows = []
    for name, found in scores.items():
        values = whole(corpus, found)
        known = values[np.isfinite(values)]
        quantiles = np.quantile(known, [0.0, 0.1, 0.5, 0.9, 1.0]) if len(known) else [float("nan")] * 5
        rows.append([name, found.scorer, count(len(values) - len(known)), *(text(float(q)) for q in quantiles)])
    head = ["scores", "scorer", "without score", "lowest", "10%", "median", "90%", "highest"]
    section = PageSection(id="summary", title="Summary", tables=[Table(head=head, rows=rows, numbers=2)])
    domains = [
        [entry.name, count(entry.documents), count(entry.tokens)]
        + [
            text(float(np.nanmean(found.of[entry.name]))) if _known(found, entry.name) else "–"
            for found in scores.values()
        ]
        for entry in corpus.entries
    ]
    section.tables.append(
        Table(head=["domain", "documents", "tokens", *(f"mean {n}" for n in scores)], rows=domains, caption="By domain")
    )
    return section


def _known(scores: Scores, domain: str) -> bool:
    return bool(np.isfinite(scores.of[domain]).any())


def _histograms(corpus: CorpusDocuments, scores: Mapping[str, Scores]) -> PageSection:
    """One panel for each scoring, a line for each domain: the share of its documents in each bin."""
    panels = []
    for name, found in scores.items():
        values = whole(corpus, found)
        known = values[np.isfinite(values)]
        if not len(known):
            continue
        low, high = np.quantile(known, [0.005, 0.995])
        edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
        panel = Panel(f"{name} ({found.scorer})", "score", "share of the domain")
        for line, entry in enumerate(corpus.entries[:MOST_LINES]):
            own = found.of[entry.name]
            own = np.clip(own[np.isfinite(own)], edges[0], edges[-1])
            if len(own):
                shares = np.histogram(own, edges)[0] / len(own)
                panel.line(line, (edges[:-1] + edges[1:]) / 2, shares, tip=f"{entry.name}: {len(own):,} documents")
        panel.zero = True
        panels.append(panel)
    more = len(corpus.entries) - MOST_LINES
    note = f" {more} more domains are in the tables." if more > 0 else ""
    return PageSection(
        id="histograms",
        title="Histograms by domain",
        groups=[Group(text=f"The outermost 0.5% at either end stand in the outermost bins.{note}", panels=panels)],
    )


def _agreement(corpus: CorpusDocuments, scores: Mapping[str, Scores]) -> PageSection:
    """Spearman's correlation over all documents, and its mean within the domains."""
    tables = []
    for caption, within in (("Over all documents", False), ("Within domains, the mean over domains", True)):
        rows = []
        for name, one in scores.items():
            cells = []
            for other in scores.values():
                if within:
                    found = [rank_correlation(one.of[e.name], other.of[e.name]) for e in corpus.entries]
                    known = [value for value in found if np.isfinite(value)]
                    cells.append(text(float(np.mean(known)) if known else None, 2))
                else:
                    cells.append(text(rank_correlation(whole(corpus, one), whole(corpus, other)), 2))
            rows.append([name, *cells])
        tables.append(Table(head=["", *scores], rows=rows, caption=caption))
    return PageSection(id="agreement", title="Rank correlation", tables=tables)


def _usual(names: Sequence[str]) -> list[str]:
    return [f"{rule}@{name}" for name in names for rule in RULES]


def _kept(corpus: CorpusDocuments, scores: Mapping[str, Scores], rules: Sequence[str], share: float) -> PageSection:
    tokens = np.array([stream.num_tokens for stream in corpus.streams], dtype=np.float64)
    budget = max(1, int(share * tokens.sum()))
    names = [entry.name for entry in corpus.entries]
    shares, mixtures = [], [["the corpus", *(percent(t / tokens.sum()) for t in tokens)]]
    for rule in rules:
        parsed = parse_rules(rule)
        there = min(budget, _allowed(corpus, scores, parsed))
        choice = choose(corpus, scores, parsed, there)
        kept = np.array([choice.tokens[choice.kept & (choice.domains == i)].sum() for i in range(len(names))])
        shares.append(
            [rule, percent(kept.sum() / tokens.sum()), *(percent(k / t) for k, t in zip(kept, tokens, strict=True))]
        )
        mixtures.append([rule, *(percent(k / kept.sum()) for k in kept)])
    return PageSection(
        id="kept",
        title="What a rule would keep",
        text=[f"Of a budget of {percent(share)} of the tokens, by share of the tokens of each domain."],
        tables=[
            Table(head=["rule", "all", *names], rows=shares, caption="Kept of each domain"),
            Table(head=["rule", *names], rows=mixtures, caption="The mixture that is kept"),
        ],
    )


def _allowed(corpus: CorpusDocuments, scores: Mapping[str, Scores], rules: RuleSet) -> int:
    """Count the tokens that rules allow without a budget."""
    choice = choose(corpus, scores, rules, None)
    return int(choice.tokens[choice.kept].sum())


def _documents(corpus: CorpusDocuments, name: str, scores: Scores) -> PageSection:
    values = whole(corpus, scores)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(-values[known], kind="stable")]
    middle = max(0, len(order) // 2 - _SHOWN // 2)
    columns = (
        ("Highest", order[:_SHOWN]),
        ("Middle", order[middle : middle + _SHOWN]),
        ("Lowest", order[::-1][:_SHOWN]),
    )
    return PageSection(
        id=f"documents-{name}",
        title=f"Documents by {name}",
        excerpts=[
            Excerpts(
                title="",
                columns=[(title, [_excerpt(corpus, values, int(p)) for p in places]) for title, places in columns],
            )
        ],
    )


def _excerpt(corpus: CorpusDocuments, values: np.ndarray, place: int) -> Excerpt:
    starts = np.concatenate([[0], np.cumsum([entry.documents for entry in corpus.entries])])
    domain = int(np.searchsorted(starts, place, side="right")) - 1
    document = corpus.one(domain, place - int(starts[domain]))
    shown = corpus.text(document, 0, _EXCERPT_TOKENS)
    score = number(values[place], (float(np.nanstd(values)) or 1.0) / 100)
    return Excerpt(
        domain=corpus.entries[domain].name,
        line=f"document {document.number:,} ({len(document.ids):,} tokens), score {score}",
        text=shown[:_EXCERPT_CHARACTERS],
        cut=len(document.ids) > _EXCERPT_TOKENS or len(shown) > _EXCERPT_CHARACTERS,
    )


def _settings(scores: Mapping[str, Scores], command: str) -> PageSection:
    files = [(f"Settings of {name}", _pretty(found.settings)) for name, found in scores.items()]
    shown = [f"Made by: {command}"] if command else []
    return PageSection(id="settings", title="Settings", text=shown, files=files)


def _pretty(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), indent=1)
