"""What a scorer is: one number for each document. docs/static_selection.md shows how to add one."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opus.corpus_scores.documents import PROXY, Block, CorpusDocuments, ScoreError
from megatron_opus.data.prepare.records import file_sha256
from megatron_opus.files import atomic_file

LEARNED = "learned.npz"


class DocumentScorer(ABC):
    """Gives every candidate document one float32; NaN where it has no score, as an empty document has no loss.

    A score may depend on the document, the corpus and `identity()`, and on nothing else: not on the documents beside
    it, and not on what was scored before. Then an interrupted scoring goes on to the same bytes, and parts of it can
    run anywhere.
    """

    name: str
    piece_tokens: int | None = None  # of one file, so lost by a kill at most; None: as many as documents.py says
    block_tokens: int | None = None  # that `score` is given at once, after which the progress bar moves

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything that the scores depend on beside the corpus, as plain data for a JSON file."""

    def prepare(self, corpus: CorpusDocuments, directory: Path, part: tuple[int, int]) -> None:  # noqa: B027
        """Learn what is needed before the first document is scored; nothing by default.

        directory: of the scores; what took long to learn is kept there and read by the next run. part: (i, n) of the
        pieces that this process scores.
        """

    @abstractmethod
    def score(self, block: Block) -> np.ndarray:
        """Return [documents of the block] float32."""


class LearningScorer(DocumentScorer):
    """A scorer that learns arrays from a target and a sample of the corpus. They are kept beside its scores."""

    def prepare(self, corpus: CorpusDocuments, directory: Path, part: tuple[int, int]) -> None:
        path = directory / LEARNED
        if not path.exists():
            arrays = self.learn(corpus)
            with atomic_file(path) as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]
        try:
            with np.load(path) as found:
                self.use({name: found[name] for name in found.files})
        except (OSError, ValueError, KeyError) as error:
            raise ScoreError(f"{path}: not readable ({error}); remove it and run again") from error

    @abstractmethod
    def learn(self, corpus: CorpusDocuments) -> dict[str, np.ndarray]:
        """Return what `use` needs, the same for the same corpus and settings."""

    @abstractmethod
    def use(self, learned: Mapping[str, np.ndarray]) -> None:
        """Take up what `learn` returned, now or in an earlier run."""


def target_identity(sources: Sequence[str]) -> list[dict[str, str]]:
    """Describe a target by the content of its files. Raises ScoreError for no source and for a missing file."""
    if not sources:
        raise ScoreError("target: expected files of text, NAME=FILE of a benchmark, or `proxy`; got none (--target)")
    found = []
    for source in sources:
        if source == PROXY:
            found.append({"source": PROXY})  # the corpus's fingerprint covers it
            continue
        name, sep, path = source.partition("=")
        file = Path(path if sep and not Path(source).exists() else source)
        if not file.is_file():
            raise ScoreError(
                f"target {source}: expected a file of text, NAME=FILE of a benchmark, or `{PROXY}`; found no such file"
            )
        found.append({"source": f"{name}=" if sep else "text", "sha256": file_sha256(file)})
    return found


def array_digest(array: np.ndarray) -> str:
    """Return the sha256 of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


Say = Callable[[str], None]
