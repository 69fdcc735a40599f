"""Compare the token files of a prepared directory with what its manifest records: contents, and ids of the vocabulary.

A size says little: a disk or a copy may change bytes and keep it. Reading a corpus of 1 TB at every start costs
minutes, so a start compares a sample, and whole files when it is asked to or when a run is resumed.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_opus.data.manifest import FILE_NAME, Manifest, base_directory
from megatron_opus.data.prepare.records import file_sha256
from megatron_opus.errors import Refusal

if TYPE_CHECKING:  # importing torch takes seconds, which `prepare-data --help` need not wait for
    from megatron_opus.types import TokenDocuments

BLOCKS, BLOCK = 64, 1 << 16  # evenly spaced blocks of bytes, the first and the last of the file among them


class TokenFileError(Refusal, ValueError):
    """A token file whose contents are not those that its manifest records, or that no tokenizer of it can have made."""

    of_one_rank = True  # ranks divide the files


def sampled_sha256(path: Path) -> str:
    """Compute the SHA-256 of 64 blocks of 64 KiB, evenly spaced; of the whole file where it is not larger than that."""
    size = path.stat().st_size
    if size <= BLOCKS * BLOCK:
        return file_sha256(path)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for number in range(BLOCKS):
            stream.seek(number * (size - BLOCK) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def verify_contents(directory: Path, manifest: Manifest, *, whole: bool, share: tuple[int, int] = (0, 1)) -> int:
    """Compare digests of `.bin` and `.idx` with those of the manifest; return how many bytes of files were compared.

    With `whole` every byte is read, else a sample. `share` (i, n) takes every n-th file, largest first, so that ranks
    divide the work. A large file of a manifest that recorded no sample is left out unless `whole`. Raises
    TokenFileError naming the file.
    """
    expected: dict[Path, tuple[str, str]] = {}
    for entry in manifest.datasets:
        prefix = base_directory(directory, entry) / entry.prefix
        expected[Path(f"{prefix}.bin")] = entry.bin_sha256, entry.bin_sample_sha256
        expected[Path(f"{prefix}.idx")] = entry.idx_sha256, entry.idx_sample_sha256
    sizes = {path: path.stat().st_size for path in expected}

    def compare(path: Path) -> int:
        of_all, of_sample = expected[path]
        wanted = of_all if whole or sizes[path] <= BLOCKS * BLOCK else of_sample
        if not wanted:
            return 0
        found = file_sha256(path) if whole else sampled_sha256(path)
        if found != wanted:
            raise TokenFileError(
                f"{path}: its contents are not those that {FILE_NAME} records (expected sha256 {wanted}, found {found}"
                f"{'' if whole else ' of a sample'}); restore the file, or prepare the data again"
            )
        return sizes[path]

    mine = sorted(expected, key=lambda path: (-sizes[path], path))[share[0] :: share[1]]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return sum(pool.map(compare, mine))


class InVocabulary:
    """`TokenDocuments` whose reads are compared with the vocabulary. The file is named, which a lookup would not do."""

    def __init__(self, documents: TokenDocuments, vocab_size: int, file: Path) -> None:
        self.name, self.num_tokens = documents.name, documents.num_tokens
        self._documents, self._vocab_size, self._file = documents, vocab_size, file

    @property
    def document_ends(self) -> np.ndarray:
        return self._documents.document_ends

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Read [length] int64 tokens of the stream. Raises TokenFileError for an id out of the vocabulary."""
        found = self._documents.tokens(start, length)
        if length and not (found.min() >= 0 and found.max() < self._vocab_size):
            at = int(np.flatnonzero((found < 0) | (found >= self._vocab_size))[0])
            raise TokenFileError(
                f"{self._file}: token {start + at} of {self.name} is {found[at]}, expected ids from 0 to "
                f"{self._vocab_size - 1}, the tokenizer's; restore the file, or prepare the data again"
            )
        return found
