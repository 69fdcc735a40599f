"""Hashed uni- and bigrams of token ids.

The n-grams are those of the corpus's tokenizer, not of words: nothing is decoded, so that a core counts millions of
tokens a second. The token that ends a document is none of them.

    ids [tokens], ends [n]  ->  hashes [m] int64 in 0..columns-1, bounds [n + 1]
    document i has the hashes bounds[i]..bounds[i + 1]: 2 t - 1 for t tokens, none for an empty document
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_opus.corpus_scores.documents import Block, ScoreError
from megatron_opus.selection.ngrams import ngram_hashes


def hashed_ngrams(block: Block, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (hashes [m] int64, bounds [n + 1] int64) of the documents of a block; columns: a power of two."""
    ids = torch.from_numpy(block.ids)
    unigrams, bigrams = ngram_hashes(ids)
    both = np.empty((len(block.ids), 2), dtype=np.int64)
    both[:, 0] = unigrams.numpy()
    both[:-1, 1] = bigrams.numpy()
    both &= columns - 1
    used = np.ones(both.shape, dtype=bool)
    last = block.ends - 1  # the end-of-document tokens
    used[last] = False
    before = last - 1  # the last tokens of documents: no bigram goes on into the next document
    used[before[before >= 0], 1] = False
    counts = np.maximum(2 * (block.ends - block.starts - 1) - 1, 0)
    return both[used], np.concatenate([[0], np.cumsum(counts)])


def counts_matrix(block: Block, columns: int) -> Any:
    """Return the counts as a scipy CSR matrix [n, columns] float32, columns of a row ascending, each once."""
    from scipy.sparse import csr_matrix

    hashes, bounds = hashed_ngrams(block, columns)
    found = csr_matrix((np.ones(len(hashes), dtype=np.float32), hashes, bounds), shape=(len(block), columns))
    found.sum_duplicates()
    return found


def features(block: Block, columns: int) -> Any:
    """Return CSR [n, columns] float32: 1 + log(count), rows of length 1; an empty document is a row of zeros."""
    from sklearn.preprocessing import normalize

    found = counts_matrix(block, columns)
    found.data = 1.0 + np.log(found.data)
    return normalize(found, copy=False)


def check_columns(columns: int) -> int:
    """Return the number of columns. Raises ScoreError unless it is a power of two from 256 to 2^26."""
    if columns < 256 or columns > 1 << 26 or columns & (columns - 1):
        raise ScoreError(f"columns: expected a power of two from 256 to {1 << 26}, got {columns}")
    return columns
