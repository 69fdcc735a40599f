"""Megatron-LM's own way to prepare a corpus, for comparison: one process builds what a pool of others tokenizes.

Written for measurements after the description of `tools/preprocess_data.py` in Megatron-LM's documentation: lines go to
a `multiprocessing` pool in chunks of 32, come back as lists of ids, and `IndexedDatasetBuilder.add_document` appends
them one by one.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

CHUNK = 32


class _Encoder:
    """What a process of the pool does with a line."""

    tokenizer: Any  # opened once in each process, and kept at the class as Megatron does

    def __init__(self, open_tokenizer: Callable[[], Any], text_key: str) -> None:
        self._open, self._text_key = open_tokenizer, text_key

    def start(self) -> None:
        _Encoder.tokenizer = self._open()

    def __call__(self, line: str) -> list[int]:
        return [*self.tokenizer.encode(json.loads(line)[self._text_key]), self.tokenizer.eod]


def megatron_preprocess(
    source: Path, prefix: Path, vocab_size: int, open_tokenizer: Callable[[], Any], workers: int, text_key: str = "text"
) -> int:
    """Write `prefix`.bin / `prefix`.idx of a .jsonl file; the tokens, end-of-document tokens included.

    open_tokenizer: picklable, called once in each of the `workers` processes. This process writes what they give.
    """
    encoder = _Encoder(open_tokenizer, text_key)
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=DType.optimal_dtype(vocab_size))
    tokens = 0
    with multiprocessing.Pool(workers, initializer=encoder.start) as pool, source.open(encoding="utf-8") as lines:
        for ids in pool.imap(encoder, lines, CHUNK):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
            tokens += len(ids)
        pool.close()
        pool.join()  # so that their processor time is counted
    builder.finalize(get_idx_path(str(prefix)))
    return tokens
