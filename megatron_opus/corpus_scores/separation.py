"""How well scores tell the documents of two domains apart: a test of a score as a filter, on labelled text.

    AUC     probability that a random good document scores above a random bad one, ties counted half
    pairs   the same over pairs of a good and a bad document whose lengths differ by at most a tenth

An AUC of 0.5 is chance; below it the score ranks the bad documents higher. Intervals are the 2.5% and the 97.5%
quantile of 1,000 bootstrap samples of the documents, drawn within each domain, or of the pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from megatron_opus.corpus_scores.documents import CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.score_files import Scores

LENGTH = "length"  # the baseline: more tokens, a higher score
_SAMPLES, _SEED, _NEAR = 1000, 0, 0.1


@dataclass(frozen=True, kw_only=True)
class Separation:
    """One score's row. low, high: bootstrap interval. pairs: how many of equal length there are; 0: no pair_auc."""

    name: str
    good: int
    bad: int
    auc: float
    low: float
    high: float
    pairs: int
    pair_auc: float
    pair_low: float
    pair_high: float


def separations(corpus: CorpusDocuments, scores: Mapping[str, Scores], good: str, bad: str) -> list[Separation]:
    """Return a row for the length in tokens and for each scoring: how it tells domain `good` from domain `bad`.

    Documents without a score are left out of its row. Raises ScoreError for a domain that the corpus has not, and
    where a scoring has not two documents of each.
    """
    names = [entry.name for entry in corpus.entries]
    for domain in (good, bad):
        if domain not in names:
            raise ScoreError(f"domain {domain!r}: expected one of {', '.join(names)}")
    lengths = {d: np.diff(corpus.streams[names.index(d)].document_ends, prepend=0).astype(float) for d in (good, bad)}
    columns: dict[str, Mapping[str, np.ndarray]] = {
        LENGTH: lengths,
        **{name: found.of for name, found in scores.items()},
    }
    rows = [_row(name, of[good], of[bad], lengths[good], lengths[bad]) for name, of in columns.items()]
    none = float("nan")  # in pairs of equal length, what is left of the length is how they were matched
    rows[0] = replace(rows[0], pair_auc=none, pair_low=none, pair_high=none)
    return rows


def auc(good: np.ndarray, bad: np.ndarray) -> float:
    """Return P(good > bad) + P(good = bad) / 2 of two samples, from their ranks."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([good, bad]))
    return float((ranks[: len(good)].sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad)))


def equal_length_pairs(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Return [pairs, 2] int64 places in the lengths `good` and `bad`, each used once, nearest lengths first taken."""
    free = np.argsort(good, kind="stable").tolist()
    found = []
    for place in np.argsort(bad, kind="stable").tolist():
        if not free:
            break
        distance = [abs(np.log(good[i] / bad[place])) for i in free]
        best = int(np.argmin(distance))
        if distance[best] <= _NEAR:
            found.append((free.pop(best), place))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _row(name: str, good: np.ndarray, bad: np.ndarray, good_lengths: np.ndarray, bad_lengths: np.ndarray) -> Separation:
    known, known_bad = np.isfinite(good), np.isfinite(bad)
    good, bad = good[known].astype(np.float64), bad[known_bad].astype(np.float64)
    if min(len(good), len(bad)) < 2:
        raise ScoreError(
            f"{name}: expected scores of at least two documents of each domain, got {len(good)}, {len(bad)}"
        )
    random = np.random.default_rng(_SEED)
    drawn = [auc(random.choice(good, len(good)), random.choice(bad, len(bad))) for _ in range(_SAMPLES)]
    pairs = equal_length_pairs(good_lengths[known], bad_lengths[known_bad])
    difference = np.sign(good[pairs[:, 0]] - bad[pairs[:, 1]]) / 2 + 0.5
    again = [random.choice(difference, len(difference)).mean() for _ in range(_SAMPLES)] if len(pairs) else [np.nan]
    low, high = np.quantile(drawn, [0.025, 0.975])
    pair_low, pair_high = np.quantile(again, [0.025, 0.975])
    return Separation(
        name=name,
        good=len(good),
        bad=len(bad),
        auc=auc(good, bad),
        low=float(low),
        high=float(high),
        pairs=len(pairs),
        pair_auc=float(difference.mean()) if len(pairs) else float("nan"),
        pair_low=float(pair_low),
        pair_high=float(pair_high),
    )


def as_markdown(rows: list[Separation]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| score | AUC | 95% | AUC of pairs of equal length | 95% | pairs |", "|---|---|---|---|---|---|"]
    for r in rows:
        pairs = "– | –" if np.isnan(r.pair_auc) else f"{r.pair_auc:.2f} | {r.pair_low:.2f} to {r.pair_high:.2f}"
        lines.append(f"| {r.name} | {r.auc:.2f} | {r.low:.2f} to {r.high:.2f} | {pairs} | {r.pairs} |")
    return "\n".join(lines)
