"""Documents that contain benchmark text: word n-grams in common, found by hash and confirmed word by word.

Words are runs of letters and digits in lower case, so that punctuation, case and line breaks hide nothing. A document
overlaps with an item when it has 13 consecutive words of one of the item's passages; a question of 8 to 12 words counts
when the document has all of it. Shorter questions cannot be told from ordinary language and are not looked for.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from megatron_opus.data.benchmarks import BenchmarkItem

NGRAM = 13
SHORTEST = 8  # words of a question that is looked for as a whole
_WORD = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses no bit


class BenchmarkText:
    """The n-grams of all items, to look documents up in.

    too_short: items that are not looked for: no passage of theirs has 13 words, and the question has fewer than 8.
    Memory: 12 bytes per distinct n-gram and the words of the items.
    """

    def __init__(self, items: Sequence[BenchmarkItem]) -> None:
        hashes: dict[int, list[np.ndarray]] = {}
        owners: dict[int, list[np.ndarray]] = {}
        self._plain: list[str] = []
        self.too_short = 0
        for number, item in enumerate(items):
            passages = [words(passage) for passage in item.passages()]
            # A line per passage: an n-gram, whose words are joined by spaces, never crosses one.
            self._plain.append("\n".join(f" {' '.join(passage)} " for passage in passages))
            kept = [(NGRAM, p) for p in passages if len(p) >= NGRAM]
            if SHORTEST <= len(passages[0]) < NGRAM:
                kept.append((len(passages[0]), passages[0]))
            self.too_short += not kept
            for length, passage in kept:
                found = _ngrams(_word_hashes(passage), length)
                hashes.setdefault(length, []).append(found)
                owners.setdefault(length, []).append(np.full(len(found), number, dtype=np.int32))
        self._tables: list[tuple[int, np.ndarray, np.ndarray]] = []
        for length in sorted(hashes, reverse=True):
            unique, first = np.unique(np.concatenate(hashes[length]), return_index=True)
            self._tables.append((length, unique, np.concatenate(owners[length])[first]))

    def find(self, text: str) -> int | None:
        """Index of an item that `text` overlaps with; None for no overlap."""
        found = words(text)
        word_hashes = _word_hashes(found)
        for length, table, owner in self._tables:
            if len(found) < length:
                continue
            candidates = _ngrams(word_hashes, length)
            at = np.minimum(np.searchsorted(table, candidates), len(table) - 1)
            for place in np.flatnonzero(table[at] == candidates).tolist():
                number = int(owner[at[place]])
                if f" {' '.join(found[place : place + length])} " in self._plain[number]:
                    return number
        return None


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _word_hashes(found: Sequence[str]) -> np.ndarray:
    # crc32 is fast and the same everywhere; words that collide are told apart in the end, by comparing them.
    return np.fromiter(
        (zlib.crc32(w.encode("utf-8", "surrogatepass")) for w in found), dtype=np.uint64, count=len(found)
    )


def _ngrams(word_hashes: np.ndarray, length: int) -> np.ndarray:
    """[words - length + 1] uint64: polynomial hash of every run of `length` words."""
    count = len(word_hashes) - length + 1
    result = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(length):
            result = result * _FACTOR + word_hashes[offset : offset + count]
    return result
