"""Open the data of a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from megatron_opus.backends.formats import indexed
from megatron_opus.config import RunConfig
from megatron_opus.data.corpus import Corpus
from megatron_opus.data.prepare.embedded import prepare_embedded
from megatron_opus.data.token_files import verify_contents

Say = Callable[[str], object]


def open_corpus(recipe: RunConfig, say: Say, *, whole: bool = False, share: tuple[int, int] = (0, 1)) -> Corpus:
    """Open the recipe's data, after comparing its files with their manifest; the embedded corpus is made on first use.

    A sample of each file is compared, or with `whole` every byte, of which rank i of n takes the `share` (i, n).
    """
    path = Path(recipe.data.path)
    if recipe.data.path == "embedded":
        path = prepare_embedded(recipe.data.cache_dir, indexed, progress=False, log=say)  # type: ignore[arg-type]
    corpus = Corpus.open(path, recipe.data, indexed.open_documents, proxy_length=recipe.scored_length)
    started = time.perf_counter()
    size = verify_contents(path, corpus.manifest, whole=whole, share=share if whole else (0, 1)) / 2**30
    if whole:
        seconds = time.perf_counter() - started
        say(f"verified the contents of the data: {size:.2f} GiB in {seconds:.1f} s, on this rank")
    for entry in corpus.summary():
        say(f"data: {entry['role']} {entry['name']}: {entry['tokens']:,} tokens, {entry['sequences']:,} sequences")
    if (shares := corpus.proxy_shares()) and len(shares) > 1:
        said = ", ".join(f"{name} {share:.2g}" for name, share in sorted(shares.items(), key=lambda x: -x[1]))
        why = "data.proxy_weights" if recipe.data.proxy_weights else "by their number; data.proxy_weights: none"
        say(f"proxy: {said} of its sequences ({why})")
    return corpus
