"""Megatron's IndexedDataset on disk: a token stream (`.bin`) and the lengths of its documents (`.idx`).

Everything that knows the file format is here; `megatron_opus.data` gets these functions and objects passed in.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, get_bin_path, get_idx_path

from megatron_opus.errors import Refusal

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries (documents + 1)
_CHUNK_ITEMS = 1 << 20


class IndexedDataError(Refusal, ValueError):
    """A `.bin` / `.idx` pair that cannot be read as what it claims to be."""

    of_one_rank = True


class IndexedDocuments:
    """`TokenDocuments` over a memory-mapped IndexedDataset: the documents one after the other as one stream.

    `num_tokens` counts every token of the stream, end-of-document tokens included.
    """

    def __init__(self, name: str, dataset: IndexedDataset, idx: Path) -> None:
        self.name, self._idx = name, idx
        self._dataset = dataset
        self._dtype = np.dtype(dataset.index.dtype)
        self.num_tokens = _stream_tokens(dataset.index.sequence_pointers, dataset.sequence_lengths, self._dtype)
        self._document_ends: np.ndarray | None = None

    @property
    def document_ends(self) -> np.ndarray:
        """[documents], int64, ascending, exclusive. Built at the first use: 8 bytes of memory per document."""
        if self._document_ends is None:
            starts = np.append(self._dataset.index.sequence_pointers // self._dtype.itemsize, self.num_tokens)
            numbers = np.asarray(self._dataset.document_indices)
            within = len(numbers) > 1 and numbers[0] == 0 and np.all(np.diff(numbers) >= 0)
            if not (within and numbers[-1] == len(starts) - 1 and np.all(np.diff(starts) >= 0)):
                raise IndexedDataError(
                    f"{self.name}: {self._idx}: its documents do not follow each other from the first token to the "
                    "last; the file is damaged: restore it, or prepare the data again"
                )
            self._document_ends = starts[numbers[1:]]
        return self._document_ends

    def tokens(self, start: int, length: int) -> np.ndarray:
        """[length], int64, tokens of the stream from `start`. Raises IndexError outside of the stream."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(
                f"{self.name}: tokens {start}..{start + length} asked for, the stream has {self.num_tokens}"
            )
        read = self._dataset.bin_reader.read(dtype=self._dtype.type, count=length, offset=start * self._dtype.itemsize)
        return read.astype(np.int64)


def open_documents(name: str, prefix: str | Path) -> IndexedDocuments:
    """Open `prefix`.bin / `prefix`.idx, after checking that both have exactly the size that the index promises.

    Raises IndexedDataError naming the file and the bytes expected and found.
    """
    idx, bin_ = Path(get_idx_path(str(prefix))), Path(get_bin_path(str(prefix)))
    for path in (idx, bin_):
        if not path.is_file():
            raise IndexedDataError(
                f"{name}: {path} is missing; prepare the data again (tools/prepare_data.py) or restore the file"
            )
    dtype, lengths, pointers = _check_index(name, idx)
    expected = _stream_tokens(pointers, lengths, dtype) * dtype.itemsize
    found = bin_.stat().st_size
    if found != expected:
        raise IndexedDataError(
            f"{name}: {bin_} has {found} bytes, expected {expected} according to {idx.name}; the file is "
            f"{'truncated' if found < expected else 'longer than its index'}: prepare the data again or restore it"
        )
    if expected == 0:
        raise IndexedDataError(f"{name}: {bin_} holds no token; prepare the data again from documents with text")
    try:
        return IndexedDocuments(name, IndexedDataset(str(prefix), mmap=True), idx)
    except (AssertionError, ValueError) as error:  # what Megatron's reader says of it
        raise IndexedDataError(f"{name}: {idx} is damaged ({error}); prepare the data again or restore it") from error


def _check_index(name: str, idx: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """dtype of the tokens, memory-mapped lengths [sequences] int32 and byte offsets [sequences] int64."""
    found = idx.stat().st_size
    with idx.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise IndexedDataError(
            f"{name}: {idx} ({found} bytes) does not start with the {_HEADER.size} bytes of an IndexedDataset header; "
            "it is truncated or another kind of file"
        )
    _, version, code, sequences, boundaries = _HEADER.unpack(head)
    if version != 1:
        raise IndexedDataError(f"{name}: {idx}: expected IndexedDataset version 1, found {version}")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if found != expected:
        raise IndexedDataError(
            f"{name}: {idx} has {found} bytes, expected {expected} for {sequences} sequences; prepare the data again "
            "or restore the file (multimodal indices are not supported)"
        )
    if sequences == 0:
        raise IndexedDataError(f"{name}: {idx} lists no document; prepare the data again from documents with text")
    lengths = np.memmap(idx, np.int32, "r", _HEADER.size, (sequences,))
    pointers = np.memmap(idx, np.int64, "r", _HEADER.size + 4 * sequences, (sequences,))
    try:
        dtype = np.dtype(DType.dtype_from_code(code))
    except (KeyError, ValueError) as error:
        raise IndexedDataError(f"{name}: {idx}: unknown code {code} for the type of its tokens; restore it") from error
    if dtype.kind not in "iu":
        raise IndexedDataError(f"{name}: {idx}: expected tokens of whole numbers, found {dtype}; restore it")
    return dtype, lengths, pointers


def _stream_tokens(pointers: np.ndarray, lengths: np.ndarray, dtype: np.dtype) -> int:
    # The last pointer is enough and keeps opening a dataset of 10^8 documents instant.
    return int(pointers[-1]) // dtype.itemsize + int(lengths[-1])


# --- writing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IndexedFiles:
    """What `write_documents` left on disk."""

    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where the vocabulary allows it, else int32: Megatron's own rule."""
    return np.dtype(DType.optimal_dtype(vocab_size))


def write_documents(
    prefix: str | Path,
    dtype: np.dtype,
    streams: Iterable[Path],
    lengths: Sequence[np.ndarray],
    kept: Sequence[np.ndarray] | None = None,
) -> IndexedFiles:
    """Write `prefix`.bin / `prefix`.idx from raw token files and the document lengths in them.

    streams: files of `dtype` tokens, concatenated in this order; lengths: int32 arrays, one per stream, whose sum is
    the number of tokens in it; kept: bool arrays, which of these documents to write (default: all). Byte for byte what
    IndexedDatasetBuilder writes for the same documents, but with arrays in place of its Python lists (some 100 bytes
    per document). Both files appear complete or not at all, the index last. Raises IndexedDataError where a stream and
    its lengths disagree.
    """
    idx, bin_ = Path(get_idx_path(str(prefix))), Path(get_bin_path(str(prefix)))
    bin_.parent.mkdir(parents=True, exist_ok=True)
    every = [np.ones(len(part), dtype=bool) for part in lengths] if kept is None else kept
    left = [part[keep] for part, keep in zip(lengths, every, strict=True)]
    documents = sum(len(part) for part in left)
    partial_bin, partial_idx = bin_.with_name(bin_.name + ".partial"), idx.with_name(idx.name + ".partial")
    bin_hash, idx_hash = hashlib.sha256(), hashlib.sha256()
    tokens = 0
    with partial_bin.open("wb") as out:
        for path, part, keep in zip(streams, lengths, every, strict=True):
            expected = int(part.sum(dtype=np.int64)) * dtype.itemsize
            found = path.stat().st_size
            if found != expected:
                raise IndexedDataError(f"{path}: expected {expected} bytes by its document lengths, found {found}")
            with path.open("rb") as stream:
                for chunk in _kept_bytes(stream, part.astype(np.int64) * dtype.itemsize, keep):
                    bin_hash.update(chunk)
                    out.write(chunk)
                    tokens += len(chunk) // dtype.itemsize
        _sync(out)
    with partial_idx.open("wb") as out:
        for piece in _index_pieces(dtype, left, documents):
            idx_hash.update(piece)
            out.write(piece)
        idx_bytes = out.tell()
        _sync(out)
    os.replace(partial_bin, bin_)
    os.replace(partial_idx, idx)
    return IndexedFiles(
        documents=documents,
        tokens=tokens,
        bin_bytes=tokens * dtype.itemsize,
        idx_bytes=idx_bytes,
        bin_sha256=bin_hash.hexdigest(),
        idx_sha256=idx_hash.hexdigest(),
    )


def _kept_bytes(stream: BinaryIO, sizes: np.ndarray, keep: np.ndarray) -> Iterator[bytes]:
    """The bytes of the documents kept, neighbouring ones together."""
    ends = np.cumsum(sizes)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8))).reshape(-1, 2)
    for first, last in edges.tolist():
        start, stop = int(ends[first] - sizes[first]), int(ends[last - 1])
        stream.seek(start)
        while start < stop:
            chunk = stream.read(min(1 << 22, stop - start))
            if not chunk:
                raise IndexedDataError(f"{stream.name}: ended at byte {start}, expected {stop}; prepare the data again")
            start += len(chunk)
            yield chunk


def _index_pieces(dtype: np.dtype, lengths: Sequence[np.ndarray], documents: int) -> Iterator[bytes]:
    yield _HEADER.pack(_MAGIC, 1, DType.code_from_dtype(dtype.type), documents, documents + 1)
    for part in lengths:
        yield np.ascontiguousarray(part, dtype="<i4").tobytes()
    offset = 0
    for part in lengths:
        ends = offset + np.cumsum(part, dtype=np.int64) * dtype.itemsize
        yield np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes() if len(part) else b""
        offset = int(ends[-1]) if len(part) else offset
    for start in range(0, documents + 1, _CHUNK_ITEMS):
        yield np.arange(start, min(start + _CHUNK_ITEMS, documents + 1), dtype="<i8").tobytes()


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
