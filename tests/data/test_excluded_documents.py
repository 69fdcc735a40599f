"""A corpus without some of its documents, read from the files of the whole one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opus.data import unlearned_spans
from megatron_opus.data.excluded_documents import WithoutDocuments, read_spans, write_spans
from megatron_opus.data.manifest import ManifestError


class Documents:
    """TokenDocuments in memory."""

    name = "x"

    def __init__(self, lengths: list[int]) -> None:
        self.document_ends = np.cumsum(lengths, dtype=np.int64)
        self.num_tokens = int(self.document_ends[-1])

    def tokens(self, start: int, length: int) -> np.ndarray:
        assert start >= 0
        assert start + length <= self.num_tokens
        return np.arange(start, start + length, dtype=np.int64)


def spans_of(documents: Documents, left_out: list[int]) -> np.ndarray:
    starts = np.concatenate([[0], documents.document_ends[:-1]])
    return np.array([[i, starts[i], documents.document_ends[i]] for i in left_out], dtype=np.int64).reshape(-1, 3)


@settings(deadline=None)
@given(st.data())
def test_it_is_the_stream_with_the_documents_cut_out(data: st.DataObject) -> None:
    """Fault: a token of a document that is left out, or a shift by one at a gap: neighbours, the ends, none, all but
    one. The oracle cuts the tokens out of the array."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=12))
    whole = Documents(lengths)
    left_out = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1))))
    view = WithoutDocuments(whole, spans_of(whole, left_out))
    starts = np.concatenate([[0], whole.document_ends[:-1]])
    kept = [np.arange(starts[i], whole.document_ends[i]) for i in range(len(lengths)) if i not in left_out]
    expected = np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)
    assert view.num_tokens == len(expected)
    assert view.document_ends.tolist() == np.cumsum([len(k) for k in kept], dtype=np.int64).tolist()
    for start in range(view.num_tokens + 1):
        for stop in range(start, view.num_tokens + 1):
            found = view.tokens(start, stop - start)
            assert found.dtype == np.int64
            assert found.tolist() == expected[start:stop].tolist()
    for start, length in ((-1, 1), (0, view.num_tokens + 1), (0, -1)):
        with pytest.raises(IndexError, match="asked for, the stream has"):
            view.tokens(start, length)


@settings(deadline=None)
@given(st.data())
def test_ranges_move_with_their_documents(data: st.DataObject) -> None:
    """Fault: the loss mask of a neighbour, or of a document that is left out, on what stays. The oracle cuts an array
    of flags, one for each token."""
    lengths = data.draw(st.lists(st.integers(2, 7), min_size=1, max_size=10))
    whole = Documents(lengths)
    left_out = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1))))
    flags, keep = np.zeros(whole.num_tokens, dtype=bool), np.ones(whole.num_tokens, dtype=bool)
    starts = np.concatenate([[0], whole.document_ends[:-1]])
    for start, length in zip(starts.tolist(), lengths, strict=True):
        masked = data.draw(st.integers(0, length - 1))  # never the last token, the end of the document
        flags[start : start + masked] = True
    for i in left_out:
        keep[starts[i] : whole.document_ends[i]] = False
    view = WithoutDocuments(whole, spans_of(whole, left_out))
    assert view.ranges(unlearned_spans.ranges(flags)).tolist() == unlearned_spans.ranges(flags[keep]).tolist()


@pytest.mark.parametrize(
    "rows", [[[1, 4, 9]], [[0, 2, 2]], [[1, 2, 4], [0, 0, 2]], [[0, 0, 3], [1, 2, 4]], [[0, -1, 2]]]
)
def test_spans_that_do_not_fit_are_refused(rows: list[list[int]]) -> None:
    """Fault: a list of documents of another corpus cuts tokens out of the middle of documents."""
    with pytest.raises(ManifestError, match="one after the other in its 8 tokens"):
        WithoutDocuments(Documents([2, 2, 4]), np.array(rows, dtype=np.int64))


def test_the_list_on_disk_is_checked(tmp_path: Path) -> None:
    """Fault: a missing or torn list is read as nothing to leave out, so that proxy documents are trained on."""
    path, spans = tmp_path / "a.npy", spans_of(Documents([2, 2, 4]), [0, 2])
    sha256 = write_spans(path, spans)
    assert np.array_equal(read_spans(path, sha256), spans)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ManifestError, match=r"a\.npy: expected sha256 .* build the proxy again"):
        read_spans(path, sha256)
    path.unlink()
    with pytest.raises(ManifestError, match="is missing: it lists the documents of the proxy"):
        read_spans(path, sha256)
