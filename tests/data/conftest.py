from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_text, write_jsonl

from megatron_opus.backends.formats import indexed
from megatron_opus.config import DataConfig
from megatron_opus.data.corpus import Corpus
from megatron_opus.data.prepare.pipeline import prepare
from megatron_opus.data.prepare.resolve import DatasetSpec, PrepareConfig, holdout


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared directory: candidate domains a, b, c of different sizes, one target `goal`."""
    root = tmp_path_factory.mktemp("prepared")
    specs = [
        DatasetSpec(
            name=name,
            role="candidates",
            sources=(str(write_jsonl(root / f"{name}.jsonl", (make_text(base + i) for i in range(count)))),),
        )
        for name, base, count in (("a", 0, 120), ("b", 1000, 60), ("c", 2000, 20))
    ]
    goal = write_jsonl(root / "goal.jsonl", (make_text(5000 + i) for i in range(60)))
    output = root / "out"
    config = PrepareConfig(
        output=output,
        tokenizer="train-sentencepiece",
        vocab_size=320,
        datasets=(*specs, *holdout("goal", (str(goal),), 0.3)),
        progress=False,
    )
    prepare(config, indexed, log=lambda _: None)
    return output


@pytest.fixture
def open_corpus(prepared: Path) -> Callable[..., Corpus]:
    def opened(proxy_length: int | None = None, **settings: Any) -> Corpus:
        data = DataConfig(**{"seq_length": 16, **settings})
        return Corpus.open(prepared, data, indexed.open_documents, proxy_length=proxy_length)

    return opened
