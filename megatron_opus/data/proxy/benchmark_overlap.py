"""Benchmark items inside of documents, by the rule of `decontaminate`: 13 consecutive words, or a whole short question.

What is looked for are the passages that a document with the item in it would contain, blanks filled in. A question of 8
to 12 words counts when the document has all of it; shorter ones, and choices of fewer than 13 words, cannot be told
from ordinary language and are not looked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opus.data.benchmarks.items import BenchmarkItem
from megatron_opus.data.prepare.decontaminate import Collector

NGRAM = 13
SHORTEST = 8  # words of a question that is looked for as a whole


class BenchmarkText:
    """The n-grams of all items, to look documents up in. too_short: items that are not looked for."""

    def __init__(self, items: Sequence[BenchmarkItem]) -> None:
        collected = Collector(NGRAM, SHORTEST)
        self.too_short = 0
        for number, item in enumerate(items):
            question, *others = item.passages()
            used = [collected.add((0, number, ""), question)]
            used += [collected.add((0, number, ""), passage, NGRAM) for passage in others]
            self.too_short += not any(used)
        self._found = collected.benchmarks([""])

    def find(self, text: str) -> int | None:
        """Index of an item that `text` overlaps with; None for no overlap."""
        overlap = self._found.find(text)
        return None if overlap is None else overlap.benchmark_line
