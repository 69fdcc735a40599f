from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_opus.backends.formats import indexed
from megatron_opus.backends.formats.indexed import IndexedDataError


def write(root: Path, shards: list[list[list[int]]], vocab_size: int = 100) -> Path:
    """Documents of several shards through the writer; returns the prefix."""
    dtype = indexed.token_dtype(vocab_size)
    streams, lengths = [], []
    for i, documents in enumerate(shards):
        streams.append(root / f"{i}.raw")
        streams[-1].write_bytes(np.array([t for d in documents for t in d], dtype=dtype).tobytes())
        lengths.append(np.array([len(d) for d in documents], dtype=np.int32))
    indexed.write_documents(root / "stream", dtype, streams, lengths)
    return root / "stream"


@settings(max_examples=25, deadline=None)
@given(
    shards=st.lists(
        st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), max_size=4), min_size=1, max_size=4
    ).filter(any),
    vocab_size=st.sampled_from([100, 70000]),
)
def test_same_bytes_as_megatrons_builder(
    shards: list[list[list[int]]], vocab_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Guards against files that Megatron reads differently, or not at all."""
    root = tmp_path_factory.mktemp("indexed")
    prefix = write(root, shards, vocab_size)
    builder = IndexedDatasetBuilder(str(root / "theirs.bin"), dtype=indexed.token_dtype(vocab_size).type)
    for document in (d for shard in shards for d in shard):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(root / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert prefix.with_suffix(suffix).read_bytes() == (root / f"theirs{suffix}").read_bytes()
    read = IndexedDataset(str(prefix))
    assert [read[i].tolist() for i in range(len(read))] == [d for shard in shards for d in shard]


def test_stream_across_documents(tmp_path: Path) -> None:
    """Guards against reads that stop at, or jump over, the end of a document."""
    documents = indexed.open_documents("x", write(tmp_path, [[[1, 2, 3], [4]], [], [[5, 6]]]))
    assert documents.num_tokens == 6
    assert documents.document_ends.tolist() == [3, 4, 6]
    assert documents.document_ends.dtype == np.int64
    assert documents.tokens(1, 4).tolist() == [2, 3, 4, 5]
    assert documents.tokens(0, 6).dtype == np.int64
    for start, length in ((0, 7), (6, 1), (-1, 2)):
        with pytest.raises(IndexError, match="the stream has 6"):
            documents.tokens(start, length)


def test_large_vocabulary(tmp_path: Path) -> None:
    """Guards against token ids above 65535 cut to 16 bits."""
    documents = indexed.open_documents("x", write(tmp_path, [[[70000, 1]]], vocab_size=100_000))
    assert documents.tokens(0, 2).tolist() == [70000, 1]
    assert indexed.token_dtype(50257) == np.uint16


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".bin", lambda b: b[:-2], r"stream\.bin has 10 bytes, expected 12 .*truncated"),
        (".bin", lambda b: b + b"\0\0", r"stream\.bin has 14 bytes, expected 12 .*longer"),
        (".bin", lambda b: b"", r"stream\.bin has 0 bytes, expected 12"),
        (".bin", lambda b: None, r"stream\.bin is missing"),
        (".idx", lambda b: None, r"stream\.idx is missing"),
        (".idx", lambda b: b[:-8], r"stream\.idx has 94 bytes, expected 102 for 3 sequences"),
        (".idx", lambda b: b[:20], r"stream\.idx \(20 bytes\) does not start with"),
        (".idx", lambda b: b"x" * 102, r"does not start with"),
    ],
)
def test_damaged_files(tmp_path: Path, suffix: str, change: object, message: str) -> None:
    """Guards against training on a file whose copy was interrupted: the error names it and the bytes."""
    prefix = write(tmp_path, [[[1, 2, 3], [4]], [[5, 6]]])
    path = prefix.with_suffix(suffix)
    content = change(path.read_bytes())  # type: ignore[operator]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IndexedDataError, match=message):
        indexed.open_documents("x", prefix)


def test_writer_checks_its_input(tmp_path: Path) -> None:
    """Guards against an index that promises other documents than the stream holds."""
    (tmp_path / "a.raw").write_bytes(b"\0\0\0\0")
    with pytest.raises(IndexedDataError, match="expected 6 bytes by its document lengths, found 4"):
        indexed.write_documents(tmp_path / "x", np.dtype(np.uint16), [tmp_path / "a.raw"], [np.array([3], np.int32)])
    assert not (tmp_path / "x.bin").exists()
