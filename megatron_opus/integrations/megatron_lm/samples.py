"""Megatron-LM's train dataset as candidates: its indices in its own order, read and laid out as its sampler does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from megatron_opus.backends.engines.megatron.training_loop import document_ids_of
from megatron_opus.config import ConfigError
from megatron_opus.data.buffer import DrawError, systematic_counts
from megatron_opus.data.iterator import IteratorError, SelectedBatchIterator
from megatron_opus.data.permutation import key, permute, uniform
from megatron_opus.types import Batch, Candidates

CHUNK = 1 << 16  # indices of a blend that are looked at together
KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class Samples:
    """The train dataset, and after it the target's: sample ids 0 .. len(train) - 1, and from there on."""

    def __init__(self, train: Any, proxy: Any) -> None:
        """`train` and `proxy` are Megatron's datasets. The datasets of a blend are the domains. `proxy` may be None."""
        self.train, self._proxy = train, proxy
        parts = list(getattr(train, "datasets", [train]))
        self.names = _names([getattr(part, "dataset_path", None) for part in parts])
        self.domains = {"candidates": self.names}
        if len(parts) > 1 and train.dataset_index is None:
            train[0]  # with deferred mapping the index is there after the first sample
        self._domain_of: np.ndarray | None = train.dataset_index if len(parts) > 1 else None
        self.shares = np.ones(1)
        if len(parts) > 1:
            weights = np.asarray(train.weights, dtype=np.float64)
            self.shares = weights / weights.sum()

    def __len__(self) -> int:
        return len(self.train)

    def domain_of(self, ids: np.ndarray) -> np.ndarray:
        """Return [n] int32: the position in `names` of each train sample's dataset."""
        return np.zeros(len(ids), np.int32) if self._domain_of is None else self._domain_of[ids].astype(np.int32)

    def sizes(self) -> np.ndarray:
        """Count [D] int64 samples of each domain."""
        found = np.zeros(len(self.names), np.int64)
        for low in range(0, len(self), CHUNK):
            piece = np.arange(low, min(low + CHUNK, len(self)), dtype=np.int64)
            found += np.bincount(self.domain_of(piece), minlength=len(found))
        return found

    def of_domain(self, domain: int, start: int) -> Iterator[np.ndarray]:
        """Yield, in order, the ids of one dataset of the blend from `start` on, once around."""
        for first, last in ((start, len(self)), (0, start)):
            for low in range(first, last, CHUNK):
                piece = np.arange(low, min(low + CHUNK, last), dtype=np.int64)
                yield piece[self.domain_of(piece) == domain]

    def rows(self, ids: np.ndarray) -> list[dict[str, Any]]:
        size = len(self)
        return [self.train[i] if i < size else self._proxy[i - size] for i in ids.tolist()]

    def batch(self, ids: np.ndarray) -> Batch:
        """Read sequences [n, L] as the scoring pass takes them."""
        rows = self.rows(ids)

        def stacked(name: str, dtype: torch.dtype) -> Tensor:
            return torch.stack([torch.as_tensor(row[name]) for row in rows]).to(dtype)

        masked = "attention_mask" in rows[0]
        return Batch(
            tokens=stacked("tokens", torch.int64),
            labels=stacked("labels", torch.int64),
            loss_mask=stacked("loss_mask", torch.float32),
            position_ids=stacked("position_ids", torch.int64),
            document_ids=document_ids_of(stacked("attention_mask", torch.bool)) if masked else None,
        )

    def tokens(self, ids: np.ndarray) -> Tensor:
        """Read [n, L] int64: the tokens of these sequences alone."""
        return torch.stack([torch.as_tensor(row["tokens"]) for row in self.rows(ids)]).to(torch.int64)

    def collated(self, ids: np.ndarray) -> dict[str, Tensor]:
        """Read one micro-batch of training exactly as Megatron's data loader gives it."""
        batch: dict[str, Tensor] = default_collate(self.rows(ids))
        if torch.cuda.is_available():
            return {name: value.pin_memory() for name, value in batch.items()}
        return batch

    def proxy_ids(self, step: int, count: int, seed: int) -> np.ndarray:
        """Return [count] int64: the target's sequences of a step, a function of (seed, step) alone.

        The pool is walked in a shuffled order, which is another one when fewer than `count` are left. Raises
        ConfigError where it is too small.
        """
        size = 0 if self._proxy is None else len(self._proxy)
        if count > size:
            raise ConfigError(
                f"selection.proxy_batch_size: expected at most {size}, the sequences of the target, got {count}; set "
                "proxy.prefix to an indexed dataset, or give Megatron-LM validation data (--eval-iters, --split)"
            )
        epoch, turn = divmod(step, size // count)
        positions = np.arange(turn * count, (turn + 1) * count)
        return len(self) + permute(positions, size, key("proxy", seed, epoch))


def _names(paths: Sequence[str | None]) -> tuple[str, ...]:
    """Name the datasets of a blend by the last parts of their paths, by all of them where two ends are alike."""
    ends = tuple("mock" if path is None else Path(path).name for path in paths)
    if len(set(ends)) == len(ends):
        return ends
    whole = tuple(f"{path}" for path in paths)
    return whole if len(set(whole)) == len(whole) else tuple(f"{path}#{i}" for i, path in enumerate(whole))


class CandidateCursor:
    """Offers the train dataset in its own order, N indices a step; what was not chosen is not offered again.

    Where a strategy gives shares to domains (ADO), each dataset of the blend has a cursor of its own, and offers the
    next of its samples. A dataset that has been offered whole begins again.
    """

    def __init__(self, samples: Samples, seed: int, start: int) -> None:
        """`start`: the first index that is offered. A run without selection has trained on those before it."""
        self.size = 0  # N of the coming step; with a prefilter, of its pool
        self.notices: list[str] = []
        self._samples, self._seed, self._position = samples, seed, start
        self._of_domain: list[int] | None = None
        self._offered = np.zeros(len(samples.names), np.int64)  # sequences of each domain, since the start
        self._used = np.zeros_like(self._offered)
        self._sequences = samples.sizes()

    @property
    def passes(self) -> int:
        """How often the dataset has been offered whole."""
        return self._position // len(self._samples)

    def draw(self, step: int, weights: Tensor | None) -> Candidates:
        """Offer `size` candidates, no two alike. weights: [D] shares of the domains, None: the order of the dataset.

        Raises DrawError where a dataset has fewer samples than it is asked for.
        """
        size, total = self.size, len(self._samples)
        if size > total:
            raise DrawError(
                f"N = {size} candidates a step: the train dataset has {total} samples; raise selection.rho, or lower "
                "selection.prefilter.pool_ratio"
            )
        if weights is None:
            ids = (self._position + np.arange(size, dtype=np.int64)) % total
        else:
            ids = self._by_shares(step, weights.numpy())
        self._position += size
        domains = self._samples.domain_of(ids)
        self._offered += np.bincount(domains, minlength=len(self._offered))
        return Candidates(step=step, sample_ids=ids, domains=domains)

    def _by_shares(self, step: int, shares: np.ndarray) -> np.ndarray:
        total = len(self._samples)
        cursors = self._of_domain or [self._position % total] * len(self._samples.names)
        counts = systematic_counts(shares, self.size, uniform("counts", self._seed, step))
        taken = []
        for d, count in enumerate(counts.tolist()):
            pieces, found = [np.empty(0, np.int64)], 0
            for piece in self._samples.of_domain(d, cursors[d]):
                pieces.append(piece)
                found += len(piece)
                if found >= count:
                    break
            if found < count:
                raise DrawError(
                    f"step {step}: {count} candidates are to come from {self._samples.names[d]}, whose part of the "
                    f"blend has {found} samples; lower its share or raise selection.rho"
                )
            ids = np.concatenate(pieces)[:count]
            cursors[d] = (int(ids[-1]) + 1) % total if count else cursors[d]
            taken.append(ids)
        self._of_domain = cursors
        # mixed, so that each data-parallel rank scores a similar share of every domain
        return np.concatenate(taken)[permute(np.arange(self.size), self.size, key("mix", self._seed, step))]

    def settle(self, candidates: Candidates, selected: np.ndarray) -> None:
        """Count what is trained on. What was not chosen is not offered again."""
        self._used += np.bincount(candidates.domains[selected], minlength=len(self._used))

    def counters(self) -> dict[str, dict[str, int]]:
        """Return domain -> offered, used (sequences since the start), epoch (times all was offered), sequences."""
        columns = (self._offered, self._used, self._sequences)
        return {
            name: {"offered": int(offered), "used": int(used), "epoch": self.passes, "sequences": int(sequences)}
            for name, offered, used, sequences in zip(self._samples.names, *columns, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self._position,
            "of_domain": self._of_domain,
            "samples": len(self._samples),
            "offered": self._offered.tolist(),
            "used": self._used.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._position = int(state["position"])
        self._of_domain = None if state["of_domain"] is None else [int(x) for x in state["of_domain"]]
        self._offered, self._used = (np.array(state[name], dtype=np.int64) for name in ("offered", "used"))


class SelectedMicroBatches(SelectedBatchIterator):
    """Megatron's train data iterator: the chosen sequences in the order micro-batch, data-parallel rank, row."""

    def fill_selection(
        self, corpus: Any, sample_ids: Any, micro_batch_size: int, weights: Tensor | None = None
    ) -> None:
        """Read this rank's micro-batches of the K chosen samples. Raises IteratorError for weights."""
        if weights is not None:
            raise IteratorError("weights of sequences: Megatron-LM's loss takes them out again; use strategy opus")
        own = np.asarray(sample_ids, dtype=np.int64).reshape(-1, self.dp_size, micro_batch_size)[:, self.dp_rank]
        self.fill([corpus.collated(row) for row in own])

    def masks(self) -> list[Tensor]:
        """Return the loss masks [b, L] of this rank's micro-batches of the step."""
        batches: list[Any] = list(self._batches)
        return [batch["loss_mask"] for batch in batches]
