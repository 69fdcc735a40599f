"""Which documents become the proxy, and how the whole corpus scored. Reads one piece of scores at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_opus.data.proxy.similarity import RECORD, DocumentRange, ProxyError, Scorer

ROW = np.dtype([*RECORD.descr, ("domain", "<i4"), ("document", "<i8")])
BINS = 400  # of the histogram, over scores from -1 to 1
MAX_LISTED = 1000  # overlapping documents named in the report; all are counted
WORST = 10


@dataclass(frozen=True, kw_only=True)
class ProxyChoice:
    """chosen: [n] ROW, best first; next_best: some of those that came next."""

    chosen: np.ndarray
    next_best: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.chosen["tokens"].sum(dtype=np.int64))

    @property
    def cutoff(self) -> float:
        """Score of the last document that was taken."""
        return float(self.chosen["score"][-1])


@dataclass(frozen=True, kw_only=True)
class Survey:
    """spans: per candidate domain, [n, 3] int64, the documents that leave it (see `views`). Histograms by tokens."""

    spans: list[np.ndarray]
    documents: np.ndarray  # [domains] int64
    tokens: np.ndarray  # [domains] int64
    histogram: np.ndarray  # [BINS] int64: tokens of all candidates by score
    chosen_histogram: np.ndarray  # [BINS]
    copies: int  # documents that leave because they have the text of a chosen one
    overlapping: int
    overlapping_tokens: int
    overlapping_rows: np.ndarray  # the MAX_LISTED with the best scores
    cut: int  # documents of which only the beginning was compared
    worst: np.ndarray  # [WORST] ROW, lowest scores first


def rows(scorer: Scorer) -> Iterator[tuple[DocumentRange, np.ndarray]]:
    """Every piece with its records and where they come from."""
    for piece in scorer.pieces:
        records = scorer.read(piece)
        found = np.empty(len(records), dtype=ROW)
        for name in RECORD.names or ():
            found[name] = records[name]
        found["domain"] = piece.domain
        found["document"] = np.arange(piece.first, piece.stop)
        yield piece, found


def choose(scorer: Scorer, budget: int) -> ProxyChoice:
    """Documents in descending order of score until they have `budget` tokens; the one that reaches it is the last.

    Of documents with the same text one is taken; none that contains benchmark text is. Equal scores stand in the order
    of the corpus. Raises ProxyError where all of the corpus has fewer tokens than the budget.
    """
    held = 2 * budget
    while True:
        best, complete = _best(scorer, held)
        total = np.cumsum(best["tokens"], dtype=np.int64)
        if len(best) and total[-1] >= budget:
            last = int(np.searchsorted(total, budget)) + 1
            return ProxyChoice(chosen=best[:last], next_best=best[last : last + WORST])
        if complete:
            raise ProxyError(
                f"token budget: expected at most the {int(total[-1]) if len(best) else 0} tokens of the candidates "
                f"that can be proxy (one of each text, none with benchmark text in it), got {budget}; lower "
                "--token-budget or give more candidates"
            )
        held *= 2  # copies of different length took each other's places


def _best(scorer: Scorer, limit: int) -> tuple[np.ndarray, bool]:
    """The best documents, one of each text, up to `limit` tokens; whether these are all there are."""
    held = np.empty(0, dtype=ROW)
    complete = True
    for _, found in rows(scorer):
        held = np.concatenate([held, found[found["overlap"] < 0]])
        held = held[np.lexsort((held["document"], held["domain"], -held["score"]))]
        _, first = np.unique(held["digest"], return_index=True)
        held = held[np.sort(first)]
        enough = int(np.searchsorted(np.cumsum(held["tokens"], dtype=np.int64), limit)) + 1
        if enough < len(held):
            held, complete = held[:enough], False
    return held, complete


def survey(scorer: Scorer, choice: ProxyChoice) -> Survey:
    """What leaves the candidates, and the distribution of the scores."""
    streams = scorer.documents.streams
    taken = np.sort(choice.chosen["digest"])
    spans: list[list[np.ndarray]] = [[] for _ in streams]
    documents, tokens = np.zeros(len(streams), dtype=np.int64), np.zeros(len(streams), dtype=np.int64)
    worst = overlapping_rows = np.empty(0, dtype=ROW)
    histogram = np.zeros(BINS, dtype=np.int64)
    left = overlapping = overlapping_tokens = cut = 0
    for piece, found in rows(scorer):
        ends = streams[piece.domain].document_ends
        leaving = found["document"][np.isin(found["digest"], taken)]
        stops = ends[leaving]
        starts = np.where(leaving > 0, ends[np.maximum(leaving - 1, 0)], 0)
        spans[piece.domain].append(np.stack([leaving, starts, stops], axis=1))
        left += len(leaving)
        documents[piece.domain] += len(found)
        tokens[piece.domain] += found["tokens"].sum(dtype=np.int64)
        histogram += by_score(found)
        cut += int(found["cut"].sum())
        hit = found[found["overlap"] >= 0]
        overlapping += len(hit)
        overlapping_tokens += int(hit["tokens"].sum(dtype=np.int64))
        overlapping_rows = _top(np.concatenate([overlapping_rows, hit]), MAX_LISTED, best=True)
        worst = _top(np.concatenate([worst, found]), WORST, best=False)
    return Survey(
        spans=[np.concatenate(part) for part in spans],
        documents=documents,
        tokens=tokens,
        histogram=histogram,
        chosen_histogram=by_score(choice.chosen),
        copies=left - len(choice.chosen),
        overlapping=overlapping,
        overlapping_tokens=overlapping_tokens,
        overlapping_rows=overlapping_rows,
        cut=cut,
        worst=worst,
    )


def by_score(found: np.ndarray) -> np.ndarray:
    """[BINS] int64: tokens by score, from -1 to 1."""
    at = np.clip(((found["score"].astype(np.float64) + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
    return np.bincount(at, weights=found["tokens"], minlength=BINS).astype(np.int64)


def _top(found: np.ndarray, count: int, best: bool) -> np.ndarray:
    score = -found["score"] if best else found["score"]
    return found[np.lexsort((found["document"], found["domain"], score))][:count]
