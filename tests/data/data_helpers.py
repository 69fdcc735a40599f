"""Small texts, files and streams that several tests of this room use."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "his", "they")


def make_text(seed: int, words: int = 60) -> str:
    """Text that differs from any other seed's, without a random generator whose streams may change."""
    return " ".join(WORDS[(seed * 7919 + i * i + i * seed) % len(WORDS)] for i in range(words)) + f" ({seed})"


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


class StreamOfNumbers:
    """TokenDocuments whose token i is i: a sequence then shows where it was read."""

    def __init__(self, name: str, num_tokens: int, ends: Iterable[int] = ()) -> None:
        self.name = name
        self.num_tokens = num_tokens
        self.document_ends = np.array([*ends, num_tokens], dtype=np.int64)

    def tokens(self, start: int, length: int) -> np.ndarray:
        assert start >= 0
        assert start + length <= self.num_tokens
        return np.arange(start, start + length, dtype=np.int64)
