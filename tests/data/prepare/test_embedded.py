from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import numpy as np
import pytest

from megatron_opus.backends.formats import indexed
from megatron_opus.config import DataConfig
from megatron_opus.data import manifest as manifests
from megatron_opus.data.corpus import Corpus
from megatron_opus.data.prepare import embedded, stdlib_text
from megatron_opus.data.prepare.embedded import SPLITS, TARGET, embedded_directory, prepare_embedded


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded corpus, made by three processes at once."""
    cache = tmp_path_factory.mktemp("cache")
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                prepare_embedded(cache, indexed, progress=False)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    prepare_embedded(cache, indexed, progress=False)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    return cache


@pytest.fixture(scope="module")
def directory(cache: Path) -> Path:
    return embedded_directory(cache)


def texts(directory: Path, role: str, domain: str) -> list[str]:
    path = directory / "text" / f"{role}-{domain}.jsonl"
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_made_once(cache: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against ranks that race for the corpus, leave rubbish, or make it again at every start."""

    def forbidden() -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(stdlib_text, "documents", forbidden)
    assert prepare_embedded(cache, indexed) == directory
    assert not list(cache.rglob("*.partial"))
    assert not (directory / ".work").exists()


def test_an_interrupted_build_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a half-made corpus that is taken for a whole one."""
    tiny = {d: [f"{d} document number {i} of this test, with some words" for i in range(400)] for d in SPLITS}
    monkeypatch.setattr(stdlib_text, "documents", lambda: tiny)
    monkeypatch.setattr(embedded, "VOCAB_SIZE", 350)
    left = embedded_directory(tmp_path)
    stale = left.with_name(f"{left.name}.{platform.node()}.12345.partial")
    (stale / "text").mkdir(parents=True)
    (stale / "text" / "candidates-prose.jsonl").write_text("half")
    assert prepare_embedded(tmp_path, indexed, progress=False, workers=1) == left
    assert not stale.exists()
    assert len(manifests.read(left).datasets) == sum(map(len, SPLITS.values()))


def test_held_out_prose_is_nowhere_else(directory: Path) -> None:
    """Guards against validation paragraphs that candidates or proxies also contain (topics include one another)."""

    def paragraphs(role: str, domain: str) -> set[str]:
        blocks = (" ".join(p.split()) for t in texts(directory, role, domain) for p in t.split("\n\n"))
        return {b for b in blocks if len(b) >= 60}

    held_out = paragraphs("validation", TARGET)
    assert len(held_out) > 50
    assert not held_out & paragraphs("proxy", TARGET)
    for domain in SPLITS:
        assert not held_out & paragraphs("candidates", domain)
    assert not paragraphs("proxy", TARGET) & paragraphs("candidates", TARGET)


def test_what_is_in_it(directory: Path) -> None:
    """Guards against an embedded corpus on which nothing can be shown: too little of it, or nothing but the target."""
    manifest = manifests.read(directory)
    corpus = Corpus.open(directory, DataConfig(seq_length=256), indexed.open_documents)
    assert corpus.domains["candidates"] == corpus.domains["validation"] == stdlib_text.DOMAINS
    assert corpus.domains["proxy"] == (TARGET,)
    tokens = {(e.role, e.name): e.tokens for e in manifest.datasets}
    candidates = sum(n for (role, _), n in tokens.items() if role == "candidates")
    assert candidates > 1_000_000
    assert 0 < tokens["candidates", TARGET] < 0.3 * candidates
    assert min(n for (role, _), n in tokens.items() if role == "validation") > 4096
    assert tokens["proxy", TARGET] > 8 * 1024
    assert manifest.tokenizer["vocab_size"] == 4096
    assert manifest.provenance["target"] == TARGET
    assert sum(e.held_out for e in manifest.datasets) < 50


def test_kinds_of_text(directory: Path) -> None:
    """Guards against domains that are mixed up: docstrings left in the code, tables in the prose."""
    prose = "\n".join(texts(directory, "candidates", "prose"))
    source = "\n".join(texts(directory, "candidates", "source"))
    tables = "\n".join(texts(directory, "candidates", "tables"))

    def letters(text: str) -> float:
        return float(np.mean([c.isalpha() for c in text[:200_000]]))

    assert source.count('"""') / len(source) < 0.1 * 2 / 1000
    assert "def " in source
    assert letters(prose) > letters(source) > letters(tables)
