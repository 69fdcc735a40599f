"""The patched data iterator: hands the selected sequences to a training step that does not know about selection.

It is filled before the step and only popped during it. Megatron may call `next` on some ranks and not on others, and
may replay microbatches: whatever draws, scores or communicates therefore happens outside of `__next__`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_opus.data.corpus import Corpus
from megatron_opus.types import Batch


class IteratorError(RuntimeError):
    """The step asked for another number of microbatches than it was given."""


class SelectedBatchIterator(Iterator[Any]):
    """Yields the microbatches it was last filled with, as types.Batch or as the dict of Megatron's `get_batch`.

    megatron_keys: yield {tokens, labels, loss_mask, position_ids, attention_mask: None}. Rank r of R data-parallel
    ranks takes rows [r K / R, (r + 1) K / R) of the K selected ones; every tensor-parallel rank of it the same ones.
    """

    def __init__(self, *, dp_rank: int = 0, dp_size: int = 1, megatron_keys: bool = False) -> None:
        if not 0 <= dp_rank < dp_size:
            raise IteratorError(f"dp_rank: expected 0..{dp_size - 1}, got {dp_rank}")
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.megatron_keys = megatron_keys
        self._batches: list[Batch] = []
        self._next = 0
        self._views: list[SelectedBatchIterator] = []

    def __len__(self) -> int:
        """Microbatches left of this step."""
        return len(self._batches) - self._next

    def fill(self, batches: Iterable[Batch]) -> None:
        """This rank's microbatches of the coming step. Raises IteratorError when the last step took only some."""
        for iterator in (self, *self._views):
            # Untouched is fine: Megatron reads on the first tensor-parallel rank only, the driver fills on all.
            if iterator._next not in (0, len(iterator._batches)):
                raise IteratorError(
                    f"{len(iterator)} of {len(iterator._batches)} microbatches of the last step were never asked for; "
                    "the step's number of microbatches must be global_batch_size / micro_batch_size / data-parallel "
                    "size (call clear() to drop them on purpose)"
                )
        filled = list(batches)
        if not filled:
            raise IteratorError("fill: expected at least one microbatch, got none")
        for iterator in (self, *self._views):
            iterator._batches, iterator._next = filled, 0

    def fill_selection(
        self,
        corpus: Corpus,
        sample_ids: Sequence[int] | np.ndarray,
        micro_batch_size: int,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Read this rank's share of the K selected sequences and cut it into microbatches.

        sample_ids: [K], in draw order, the same on every rank; weights: [K] loss weights, multiplied into the loss
        mask. Raises IteratorError unless K is a multiple of dp_size * micro_batch_size.
        """
        ids = np.asarray(sample_ids, dtype=np.int64)
        unit = self.dp_size * micro_batch_size
        if len(ids) == 0 or len(ids) % unit:
            raise IteratorError(
                f"{len(ids)} selected sequences: expected a multiple of {unit} (data-parallel size {self.dp_size} x "
                f"micro_batch_size {micro_batch_size})"
            )
        if weights is not None and weights.shape != (len(ids),):
            raise IteratorError(f"weights: expected shape ({len(ids)},), got {tuple(weights.shape)}")
        share = len(ids) // self.dp_size
        mine = slice(self.dp_rank * share, (self.dp_rank + 1) * share)
        batch = corpus.batch(ids[mine])
        if weights is not None:
            batch.loss_mask.mul_(weights[mine].to(batch.loss_mask).unsqueeze(1))
        self.fill([batch.rows(i, i + micro_batch_size) for i in range(0, share, micro_batch_size)])

    def __next__(self) -> Any:
        if self._next >= len(self._batches):
            raise IteratorError(
                f"all {len(self._batches)} selected microbatches of this step are used; the driver must select and "
                "call fill before each training step, with as many microbatches as the step accumulates"
            )
        batch = self._batches[self._next]
        self._next += 1
        return megatron_batch(batch) if self.megatron_keys else batch

    def rewind(self) -> None:
        """Begin this step's microbatches again, as Megatron does to replay a step."""
        self._next = 0

    def advance(self) -> None:
        """Megatron's counterpart of `rewind`: the step will not be replayed. Nothing to do, `fill` replaces it."""

    def clear(self) -> None:
        """Drop what is left of this step on purpose."""
        for iterator in (self, *self._views):
            iterator._batches, iterator._next = [], 0

    def view(self) -> SelectedBatchIterator:
        """An iterator over the same microbatches with its own position, filled together with this one."""
        view = SelectedBatchIterator(dp_rank=self.dp_rank, dp_size=self.dp_size, megatron_keys=self.megatron_keys)
        view._batches, view._next = self._batches, 0
        self._views.append(view)
        return view


def megatron_batch(batch: Batch) -> dict[str, torch.Tensor | None]:
    """What `get_batch_on_this_tp_rank` of Megatron-LM expects from an iterator; other keys would not travel.

    Raises IteratorError where attention is confined to documents: Megatron would need an s x s mask for each sequence.
    """
    if batch.document_ids is not None:
        raise IteratorError(
            "data.reset_attention_mask has no place in Megatron's batch keys; set it to false, or read types.Batch "
            "from the iterator (megatron_keys=False) and pass document_ids on"
        )
    return {
        "tokens": batch.tokens,
        "labels": batch.labels,
        "loss_mask": batch.loss_mask,
        "position_ids": batch.position_ids,
        "attention_mask": None,
    }


def patch_data_iterator(original: Any, selected: SelectedBatchIterator) -> Any:
    """What to hand to Megatron's `train_step` in place of `original`, its own data iterator.

    Keeps the shape: None stays None (this rank reads no data), a list of one iterator per virtual pipeline stage
    becomes a list of views, each with its own position.
    """
    if original is None:
        return None
    if isinstance(original, list):
        return [None if item is None else selected.view() for item in original]
    return selected
