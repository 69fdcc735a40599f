"""Open the data of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_opus.backends.formats import indexed
from megatron_opus.config import RunConfig
from megatron_opus.data.corpus import Corpus
from megatron_opus.data.prepare.embedded import prepare_embedded

Say = Callable[[str], object]


def open_corpus(recipe: RunConfig, say: Say) -> Corpus:
    """The recipe's data; the embedded corpus is made on first use."""
    path = Path(recipe.data.path)
    if recipe.data.path == "embedded":
        path = prepare_embedded(recipe.data.cache_dir, indexed, progress=False, log=say)  # type: ignore[arg-type]
    corpus = Corpus.open(path, recipe.data, indexed.open_documents)
    for entry in corpus.summary():
        say(f"data: {entry['role']} {entry['name']}: {entry['tokens']:,} tokens, {entry['sequences']:,} sequences")
    return corpus
