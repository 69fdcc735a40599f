"""Small texts, files and streams that several tests of this room use."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_opus.backends.formats import indexed
from megatron_opus.data import manifest as manifests
from megatron_opus.data.manifest import Manifest
from megatron_opus.data.prepare.pipeline import prepare
from megatron_opus.data.prepare.resolve import DatasetSpec, PrepareConfig
from megatron_opus.data.tokenizers import base as tokenizers

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "his", "they")


def make_text(seed: int, words: int = 60) -> str:
    """Text that differs from any other seed's, without a random generator whose streams may change."""
    return " ".join(WORDS[(seed * 7919 + i * i + i * seed) % len(WORDS)] for i in range(words)) + f" ({seed})"


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def die_at_rename(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """This process kills itself instead of its `at`-th rename, counted from 0: for forked ones."""
    rename, left = os.replace, at

    def die(source: Any, target: Any) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        rename(source, target)

    monkeypatch.setattr(os, "replace", die)


def killed(function: Callable[[], Any]) -> None:
    """Run in a forked process that kills itself with SIGKILL; fails if it ends in any other way."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


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


def spec(name: str, role: Any, *sources: Path | str) -> DatasetSpec:
    return DatasetSpec(name=name, role=role, sources=tuple(map(str, sources)))


def run(output: Path, *datasets: DatasetSpec, log: Callable[[str], None] = lambda _: None, **settings: Any) -> Manifest:
    config = PrepareConfig(
        **{
            "output": output,
            "tokenizer": "train-sentencepiece",
            "vocab_size": 300,
            "datasets": datasets,
            "progress": False,
            **settings,
        }
    )
    return prepare(config, indexed, log)


def texts_of(output: Path, role: str, name: str) -> list[str]:
    """The documents of a prepared dataset, decoded."""
    manifest = manifests.read(output)
    tokenizer = tokenizers.reopen_tokenizer(output / "tokenizer", manifest.tokenizer)
    documents = indexed.open_documents(name, output / role / name)
    ends = documents.document_ends
    starts = np.concatenate([[0], ends[:-1]])
    found = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        ids = documents.tokens(start, end - start).tolist()
        assert ids[-1] == tokenizer.eod
        assert tokenizer.eod not in ids[:-1]
        found.append(tokenizer.decode(ids))
    return found
