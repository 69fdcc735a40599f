"""Rules of `keep`: from scores to an order of the documents.

A rule gives each document a rank in [0, 1): the share of all tokens that stand before it in the order of the rule.
Keeping the documents with a rank below a threshold keeps about that share of the tokens. So rules combine:

    a and b     rank = max(rank a, rank b)      both rules, at the same threshold, keep the document
    a or b      rank = min(rank a, rank b)      at least one of them does

    top  bottom  band:A-B  gumbel:TAU           ranks over the corpus
    per-domain:top ...                          ranks within each domain: every domain keeps the same share
    top@NAME                                    of the scores with this name, where there are several
    axes:K                                      of all scores at once: the top of each of their K principal axes

Axes (after ODiS, several measures of quality that are not one): the scores are standardised over the documents that
have all of them, and rotated to the K directions in which they vary most. A document's rank is its best on any axis,
so that every axis keeps the same share. An axis points to where the sum of the standardised scores rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_opus.corpus_scores.documents import ScoreError
from megatron_opus.data.permutation import key
from megatron_opus.selection.hashing import mix

Kind = Literal["top", "bottom", "band", "gumbel", "axes"]
PER_DOMAIN = "per-domain:"
_FORM = (
    "expected top, bottom, band:A-B, gumbel:TAU or gumbel:TAU:raw, after `per-domain:` or not, and @NAME after it; or "
    "axes:K of all scores"
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule. low, high: of a band. tau: of Gumbel noise, in standard deviations unless `raw`. axes: how many."""

    kind: Kind
    scores: str = ""
    per_domain: bool = False
    low: float = 0.0
    high: float = 1.0
    tau: float = 1.0
    raw: bool = False
    axes: int = 0


@dataclass(frozen=True, kw_only=True)
class RuleSet:
    """Rules that are combined from the left to the right: rules[0] joins[0] rules[1] joins[1] ..."""

    text: str
    rules: tuple[Rule, ...]
    joins: tuple[Literal["and", "or"], ...]


def parse_rules(text: str) -> RuleSet:
    """Read `gumbel:0.5`, `per-domain:top`, `band:0.1-0.9@loss and top@dsir`. Raises ScoreError."""
    words = text.split()
    if len(words) % 2 == 0 or any(word not in ("and", "or") for word in words[1::2]):
        raise ScoreError(f"rule {text!r}: expected rules with `and` or `or` between them; a rule has no spaces")
    joins: list[Literal["and", "or"]] = ["and" if word == "and" else "or" for word in words[1::2]]
    return RuleSet(text=text, rules=tuple(_rule(word) for word in words[::2]), joins=tuple(joins))


def _rule(word: str) -> Rule:
    body, _, scores = word.partition("@")
    per_domain = body.startswith(PER_DOMAIN)
    kind, *values = body.removeprefix(PER_DOMAIN).split(":")
    if kind in ("top", "bottom") and not values:
        return Rule(kind="top" if kind == "top" else "bottom", scores=scores, per_domain=per_domain)
    try:
        if kind == "band" and len(values) == 1:
            low, high = map(float, values[0].split("-"))
            if 0.0 <= low < high <= 1.0:
                return Rule(kind="band", scores=scores, per_domain=per_domain, low=low, high=high)
            raise ScoreError(f"rule {word!r}: expected a band A-B with 0 <= A < B <= 1, shares of the tokens")
        if kind == "axes" and len(values) == 1 and not scores:
            if int(values[0]) >= 1:
                return Rule(kind="axes", per_domain=per_domain, axes=int(values[0]))
            raise ScoreError(f"rule {word!r}: expected at least one axis")
        if kind == "gumbel" and (len(values) == 1 or values[1:] == ["raw"]):
            tau = float(values[0])
            if math.isfinite(tau) and tau > 0:
                return Rule(kind="gumbel", scores=scores, per_domain=per_domain, tau=tau, raw=len(values) == 2)
            raise ScoreError(f"rule {word!r}: expected a positive temperature TAU")
    except ValueError as error:
        if isinstance(error, ScoreError):
            raise
    raise ScoreError(f"rule {word!r}: {_FORM}")


def ranks(
    rules: RuleSet, scores: Mapping[str, np.ndarray], domains: np.ndarray, tokens: np.ndarray, seed: int
) -> np.ndarray:
    """Return [n] float64 ranks in [0, 1) of all documents; infinity: the document cannot be kept.

    scores: name -> [n] float32, NaN: no score; such a document cannot be kept. domains: [n] int64, tokens: [n] int64.
    Documents with equal scores stand in their own order. Raises ScoreError for a rule whose scores are not given.
    """
    found = _rank(rules.rules[0], scores, domains, tokens, seed)
    combine: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"and": np.maximum, "or": np.minimum}
    for join, rule in zip(rules.joins, rules.rules[1:], strict=True):
        found = combine[join](found, _rank(rule, scores, domains, tokens, seed))
    return found


def named_scores(rule: Rule, names: Sequence[str]) -> str:
    """Return the name of the scores that a rule is about, or "" for all. Raises ScoreError where it is not clear."""
    if rule.kind == "axes":
        if len(names) < 2 or rule.axes > len(names):
            raise ScoreError(
                f"rule axes:{rule.axes}: expected at least two scores and at most as many axes, got {len(names)} scores"
            )
        return ""
    if rule.scores in names:
        return rule.scores
    if not rule.scores and len(names) == 1:
        return names[0]
    asked = f"@{rule.scores}" if rule.scores else "no @NAME"
    raise ScoreError(f"rule {rule.kind}: expected the name of its scores, one of {', '.join(names)}; got {asked}")


def _rank(
    rule: Rule, scores: Mapping[str, np.ndarray], domains: np.ndarray, tokens: np.ndarray, seed: int
) -> np.ndarray:
    name = named_scores(rule, list(scores))
    columns = principal_axes(scores, rule.axes) if rule.kind == "axes" else [scores[name].astype(np.float64)]
    return np.min([_ordered(rule, values, domains, tokens, seed) for values in columns], axis=0)


def principal_axes(scores: Mapping[str, np.ndarray], count: int) -> list[np.ndarray]:
    """Return `count` columns [n] float64, NaN where one of the scores is: the principal axes of standardised scores.

    Raises ScoreError where fewer than two documents have all scores, or one score is the same for all of them.
    """
    matrix = np.stack([values.astype(np.float64) for values in scores.values()], axis=1)
    known = np.isfinite(matrix).all(axis=1)
    if known.sum() < 2 or (spread := matrix[known].std(axis=0)).min() == 0:
        raise ScoreError("rule axes: expected scores that differ between documents which have all of them")
    standard = (matrix[known] - matrix[known].mean(axis=0)) / spread
    _, _, directions = np.linalg.svd(standard, full_matrices=False)
    found = []
    for direction in directions[:count]:
        sign = 1.0 if direction.sum() >= 0 else -1.0
        column = np.full(len(matrix), np.nan)
        column[known] = sign * standard @ direction
        found.append(column)
    return found


def _ordered(rule: Rule, values: np.ndarray, domains: np.ndarray, tokens: np.ndarray, seed: int) -> np.ndarray:
    known = ~np.isnan(values)
    result = np.full(len(values), np.inf)
    groups = [known & (domains == d) for d in np.unique(domains)] if rule.per_domain else [known]
    for group in groups:
        (places,) = np.nonzero(group)
        if len(places):
            result[places] = _within(rule, values[places], tokens[places], places, seed)
    return result


def _within(rule: Rule, values: np.ndarray, tokens: np.ndarray, places: np.ndarray, seed: int) -> np.ndarray:
    wanted = values if rule.kind in ("top", "gumbel", "axes") else -values
    if rule.kind == "gumbel":
        spread = 1.0 if rule.raw else float(values.std()) or 1.0
        wanted = values / (spread * rule.tau) + _gumbel(places, seed)
    order = np.lexsort((places, -wanted))
    sizes = tokens[order].astype(np.float64)
    before = np.empty(len(places))
    before[order] = (np.cumsum(sizes) - sizes) / sizes.sum()
    if rule.kind != "band":
        return before
    middle = before + tokens / (2 * sizes.sum())  # a document is within the band where its middle is
    return np.where((middle >= rule.low) & (middle < rule.high), np.maximum(before - rule.low, 0.0), np.inf)


def _gumbel(places: np.ndarray, seed: int) -> np.ndarray:
    """Return [n] standard Gumbel noise, each a function of the document's place in the corpus and the seed."""
    import torch

    signed = int.from_bytes(key("gumbel", seed).to_bytes(8, "little"), "little", signed=True)
    bits = mix(signed, torch.from_numpy(places.astype(np.int64))).numpy().view(np.uint64) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) / float(1 << 53)
    return -np.log(-np.log(uniform))
