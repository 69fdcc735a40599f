"""Read a prepared corpus without some of its documents, so that a large corpus need not be copied to leave them out.

An entry of the manifest may name a `base`, which is another prepared directory, and `excluded`, a file that lists the
documents left out. A reader sees one continuous stream, as if those documents had never been there.

Example: the base has three documents of 4, 3 and 5 tokens, and the second one is excluded. The stream has 9 tokens;
its tokens 0 to 3 are the base's 0 to 3, and its tokens 4 to 8 are the base's 7 to 11.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_opus.data import manifest as manifests
from megatron_opus.data import unlearned_spans
from megatron_opus.data.manifest import DatasetEntry, ManifestError, base_directory
from megatron_opus.files import atomic_file
from megatron_opus.types import TokenDocuments


def open_entry(
    directory: Path, entry: DatasetEntry, open_documents: Callable[[str, Path], TokenDocuments]
) -> TokenDocuments:
    """Open the token stream of one entry of the manifest in `directory`.

    Raises ManifestError where the base is gone or has been prepared anew, or the list of documents has changed; and
    what `open_documents` raises.
    """
    if not entry.base:
        return open_documents(entry.name, directory / entry.prefix)
    base = base_directory(directory, entry)
    _check_base(directory, base, entry)
    documents = open_documents(entry.name, base / entry.prefix)
    if not entry.excluded:
        return documents
    return WithoutDocuments(documents, read_spans(directory / entry.excluded, entry.excluded_sha256))


def open_unlearned(directory: Path, entry: DatasetEntry, documents: TokenDocuments) -> np.ndarray:
    """Read the token ranges [spans, 2] int64 of `documents` that are not learned (see unlearned_spans.py).

    `documents` is what `open_entry` gave. Raises MaskError.
    """
    place = base_directory(directory, entry) / entry.prefix
    if not isinstance(documents, WithoutDocuments):
        return unlearned_spans.open_spans(entry.name, place, entry.mask_spans, entry.tokens)
    return documents.ranges(unlearned_spans.open_spans(entry.name, place, entry.mask_spans, documents.base.num_tokens))


def _check_base(directory: Path, base: Path, entry: DatasetEntry) -> None:
    if not (base / manifests.FILE_NAME).is_file():
        raise ManifestError(
            f"{directory}: domain {entry.name} ({entry.role}) is part of {base}, which is not there; the two "
            f"directories belong together: put it back ({entry.base} from here), or build the proxy again"
        )
    for found in manifests.read(base).of_role(entry.role):
        if found.name == entry.name and not found.base:
            mine, theirs = ((e.bin_sha256, e.idx_sha256, e.mask_sha256) for e in (entry, found))
            if mine == theirs:
                return
    raise ManifestError(
        f"{directory}: domain {entry.name} ({entry.role}) is part of {base}, which has been prepared anew since and no "
        "longer has the same tokens; build the proxy again"
    )


# --- lists of documents ---------------------------------------------------------------------------------------------


def write_spans(path: Path, spans: np.ndarray) -> str:
    """Write the excluded documents, spans [n, 3] int64 (see `WithoutDocuments`), and return the file's SHA-256."""
    with atomic_file(path) as stream:
        np.save(stream, spans.astype(np.int64))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_spans(path: Path, sha256: str) -> np.ndarray:
    """Read the excluded documents, [n, 3] int64.

    Raises ManifestError for a file that is missing or is not the one that the manifest means.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing: it lists the documents of the proxy; build the proxy again") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ManifestError(
            f"{path}: expected sha256 {sha256} by {manifests.FILE_NAME}, found {found}; restore the file or build the "
            "proxy again"
        )
    return np.load(path)


class WithoutDocuments:
    """Shows the documents of another `TokenDocuments` without some of them.

    `spans` [n, 3] int64 has one row per excluded document, in ascending order: its number, its first token, and the
    token after its last one. It takes 16 bytes per excluded document, and 8 bytes per document once `document_ends` is
    asked for. Raises ManifestError for spans that do not lie one after the other in the stream.
    """

    def __init__(self, base: TokenDocuments, spans: np.ndarray) -> None:
        starts, stops = spans[:, 1], spans[:, 2]
        bounds = spans[:, 1:].reshape(-1)
        fits = len(spans) and starts[0] >= 0 and stops[-1] <= base.num_tokens and (stops > starts).all()
        if len(spans) and not (fits and (np.diff(bounds) >= 0).all() and (np.diff(spans[:, 0]) > 0).all()):
            raise ManifestError(
                f"{base.name}: the documents left out do not lie one after the other in its {base.num_tokens} tokens; "
                "build the proxy again"
            )
        self.name = base.name
        self.base = base
        self._numbers = spans[:, 0]
        self._removed = np.concatenate([[0], np.cumsum(stops - starts)])  # tokens left out before the next gap
        self._gaps = starts - self._removed[:-1]  # where each gap would be, in tokens of this stream
        self.num_tokens = int(base.num_tokens - self._removed[-1])
        self._document_ends: np.ndarray | None = None

    @property
    def document_ends(self) -> np.ndarray:
        """The token after the last one of each document, [documents] int64, ascending. Built at the first use."""
        if self._document_ends is None:
            ends = np.delete(self.base.document_ends, self._numbers)
            before = np.searchsorted(self._numbers - np.arange(len(self._numbers)), np.arange(len(ends)), side="right")
            self._document_ends = ends - self._removed[before]
        return self._document_ends

    def pieces(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """Cut `length` tokens from `start` into pieces of the base: (first token in the base, number of tokens)."""
        gap = int(np.searchsorted(self._gaps, start, side="right"))
        while length > 0:
            stop = int(self._gaps[gap]) if gap < len(self._gaps) else start + length
            piece = min(length, stop - start)
            if piece:
                yield start + int(self._removed[gap]), piece
            start, length, gap = start + piece, length - piece, gap + 1

    def ranges(self, spans: np.ndarray) -> np.ndarray:
        """Translate ascending token ranges [n, 2] of the base into tokens of this stream.

        No range may cross documents. Ranges inside excluded documents are left out.
        """
        # The gap before a token: starts ascend, and a document's tokens lie between the starts around it.
        starts = self._gaps + self._removed[:-1]
        stops = starts + np.diff(self._removed)
        before = np.searchsorted(starts, spans[:, 0], side="right")
        inside = (before > 0) & (spans[:, 0] < stops[np.maximum(before - 1, 0)]) if len(stops) else before > 0
        return (spans - self._removed[before][:, None])[~inside]

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Read `length` tokens from `start`, [length] int64. Raises IndexError outside of the stream."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(
                f"{self.name}: tokens {start}..{start + length} asked for, the stream has {self.num_tokens}"
            )
        parts = [self.base.tokens(first, count) for first, count in self.pieces(start, length)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
