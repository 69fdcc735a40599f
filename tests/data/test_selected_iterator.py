from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_opus.data.corpus import Corpus
from megatron_opus.data.iterator import IteratorError, SelectedBatchIterator, patch_data_iterator


def test_next_only_pops(open_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against reading, drawing or scoring inside `__next__`, which Megatron calls on some ranks only."""
    corpus = open_corpus()
    iterator = SelectedBatchIterator()
    iterator.fill_selection(corpus, [5, 2, 9, 7], micro_batch_size=2)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the corpus was read inside of the training step")

    monkeypatch.setattr(Corpus, "batch", forbidden)
    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    first, second = next(iterator), next(iterator)
    monkeypatch.undo()
    assert torch.equal(torch.cat([first.tokens, second.tokens]), corpus.batch([5, 2, 9, 7]).tokens)


def test_an_empty_iterator_says_what_to_do(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against a step that trains on stale or repeated microbatches, or ends the epoch with StopIteration."""
    iterator = SelectedBatchIterator()
    with pytest.raises(IteratorError, match="call fill before"):
        next(iterator)
    iterator.fill_selection(open_corpus(), [1, 2], micro_batch_size=1)
    next(iterator)
    with pytest.raises(IteratorError, match="1 of 2 microbatches"):
        iterator.fill_selection(open_corpus(), [3, 4], micro_batch_size=1)
    next(iterator)
    with pytest.raises(IteratorError, match="all 2 selected"):
        next(iterator)
    iterator.fill_selection(open_corpus(), [3, 4], micro_batch_size=1)
    iterator.fill_selection(open_corpus(), [5, 6], micro_batch_size=1)  # a rank on which nobody reads


def test_ranks_share_the_selection(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against data-parallel ranks that train on the same, or leave out, selected sequences."""
    corpus = open_corpus()
    ids = np.array([3, 1, 4, 15, 9, 2, 6, 5])
    seen = []
    for rank in range(2):
        tensor_parallel = [SelectedBatchIterator(dp_rank=rank, dp_size=2) for _ in range(2)]
        for iterator in tensor_parallel:
            iterator.fill_selection(corpus, ids, micro_batch_size=2)
            assert len(iterator) == 2
        rows = [torch.cat([next(i).tokens for _ in range(2)]) for i in tensor_parallel]
        assert torch.equal(rows[0], rows[1])
        seen.append(rows[0])
    assert torch.equal(torch.cat(seen), corpus.batch(ids).tokens)
    with pytest.raises(IteratorError, match="multiple of 6"):
        SelectedBatchIterator(dp_size=2).fill_selection(corpus, ids, micro_batch_size=3)


def test_weights_scale_the_loss_mask(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against loss weights of a strategy that are dropped or given to another sequence."""
    iterator = SelectedBatchIterator(dp_rank=1, dp_size=2)
    iterator.fill_selection(open_corpus(), [1, 2, 3, 4], 1, weights=torch.tensor([1.0, 2.0, 3.0, 0.5]))
    assert [next(iterator).loss_mask.unique().tolist() for _ in range(2)] == [[3.0], [0.5]]


def test_replay(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against a replayed step (Megatron's rerun) that sees other microbatches."""
    iterator = SelectedBatchIterator()
    iterator.fill_selection(open_corpus(), [1, 2], 1)
    first = [next(iterator).tokens for _ in range(2)]
    iterator.rewind()
    assert all(torch.equal(next(iterator).tokens, x) for x in first)
    iterator.advance()


def test_megatron_keys(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against keys that Megatron does not broadcast, and a document mask that would be lost on the way."""
    iterator = SelectedBatchIterator(megatron_keys=True)
    iterator.fill_selection(open_corpus(), [1], 1)
    batch = next(iterator)
    assert sorted(batch) == ["attention_mask", "labels", "loss_mask", "position_ids", "tokens"]
    assert batch["attention_mask"] is None
    iterator.fill_selection(open_corpus(reset_attention_mask=True), [1], 1)
    with pytest.raises(IteratorError, match="reset_attention_mask"):
        next(iterator)


def test_patched_iterator_keeps_the_shape(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against virtual pipeline stages that take microbatches from one another."""
    selected = SelectedBatchIterator()
    assert patch_data_iterator(None, selected) is None
    assert patch_data_iterator(iter([]), selected) is selected
    first, nothing, second = patch_data_iterator([iter([]), None, iter([])], selected)
    assert nothing is None
    selected.fill_selection(open_corpus(), [1, 2], 1)
    assert torch.equal(next(first).tokens, next(second).tokens)
    assert len(first) == 1
