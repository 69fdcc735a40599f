"""Copies among the candidates of a corpus: the same tokens, or nearly the same by MinHash.

    exact       two documents have the same token ids
    near:S      their sets of five tokens in a row have an estimated Jaccard similarity of at least S

The first of such documents, in the order of the corpus, is no copy. Near ones are found by the library `datasketch`
(128 permutations, locality-sensitive hashing), which keeps about 1.5 kB in memory for every document that is no copy.
"""

from __future__ import annotations

import hashlib
import time

import numpy as np

from megatron_opus.corpus_scores.documents import CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.scorer import Say
from megatron_opus.data.permutation import key

_SHINGLE, _PERMUTATIONS = 5, 128
_HASHES = np.uint64(0xFFFFFFFF)  # MinHash takes 32 bits


def copies(corpus: CorpusDocuments, kind: str, say: Say) -> np.ndarray:
    """Return [n] bool over the candidates of all domains in order: whether a document is a copy of an earlier one.

    An empty document is none. Raises ScoreError for an unknown `kind` and where `datasketch` is missing.
    """
    name, _, value = kind.partition(":")
    near = _Near(_similarity(kind, value)) if name == "near" else None
    if near is None and kind != "exact":
        raise ScoreError(f"duplicates {kind!r}: expected exact or near:SIMILARITY, for example near:0.8")
    started, tokens = time.perf_counter(), 0
    seen: set[bytes] = set()
    found: list[bool] = []
    for piece in corpus.pieces():
        for block in corpus.blocks(piece):
            for ids in block.documents():
                digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
                copy = len(ids) > 1 and digest in seen
                seen.add(digest)
                if near is not None and not copy and len(ids) > 1:
                    copy = near.is_copy(ids[:-1])
                found.append(copy)
            tokens += len(block.ids)
    seconds = time.perf_counter() - started
    say(f"{kind} duplicates: {sum(found):,} of {len(found):,} documents, {tokens / seconds:,.0f} tokens/s")
    return np.array(found, dtype=bool)


def _similarity(kind: str, value: str) -> float:
    try:
        similarity = float(value)
    except ValueError:
        similarity = 0.0
    if not 0.1 <= similarity <= 0.95:  # beyond that, the bands of the library cannot tell
        raise ScoreError(f"duplicates {kind!r}: expected near:SIMILARITY, a number from 0.1 to 0.95, as near:0.8")
    return similarity


class _Near:
    """The documents that are no copies so far."""

    def __init__(self, similarity: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ScoreError(
                f"near duplicates need datasketch ({error}): pip install 'megatron-opus[duplicates]'"
            ) from None
        self._similarity = similarity
        self._index = MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS)
        self._empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
        self._known: list[object] = []
        self._multiplier = np.uint64(key("shingles", 0) | 1)

    def is_copy(self, ids: np.ndarray) -> bool:
        """Say whether a document without its last token is like an earlier one; it is remembered where it is not."""
        sketch = self._empty.copy()
        sketch.update_batch(self._shingles(ids).tolist())
        for place in self._index.query(sketch):
            if sketch.jaccard(self._known[place]) >= self._similarity:
                return True
        self._index.insert(len(self._known), sketch)
        self._known.append(sketch)
        return False

    def _shingles(self, ids: np.ndarray) -> np.ndarray:
        """Return the distinct hashes of five tokens in a row [m] uint64 below 2^32; of all where there are fewer."""
        width = min(_SHINGLE, len(ids))
        hashes = np.zeros(len(ids) - width + 1, dtype=np.uint64)
        for offset in range(width):
            part = ids[offset : offset + len(hashes)].astype(np.uint64) + np.uint64(1)
            hashes = (hashes ^ part) * self._multiplier
            hashes ^= hashes >> np.uint64(29)
        return np.unique((hashes >> np.uint64(16)) & _HASHES)
