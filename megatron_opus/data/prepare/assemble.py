"""Finished pieces of a dataset to its files: which documents stay, their tokens, masks and scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_opus.data import unlearned_spans
from megatron_opus.data.manifest import Role
from megatron_opus.data.prepare.resolve import DatasetSpec
from megatron_opus.data.prepare.tokenize import Job
from megatron_opus.data.token_files import sampled_sha256


class TokenFiles(Protocol):
    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str


class Storage(Protocol):
    """The on-disk token format; `megatron_opus.backends.formats.indexed` is one."""

    def token_dtype(self, vocab_size: int) -> np.dtype: ...

    def write_documents(
        self,
        prefix: str | Path,
        dtype: np.dtype,
        streams: Iterable[Path],
        lengths: Sequence[np.ndarray],
        kept: Sequence[np.ndarray] | None = None,
    ) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The documents that make up a dataset."""

    jobs: tuple[Job, ...]  # the pieces that have them; later pieces are not needed
    kept: tuple[np.ndarray, ...]  # [documents] bool for each piece
    duplicates: int
    tokens: int
    full: bool  # a limit is reached: more pieces would add nothing

    @property
    def documents(self) -> int:
        return sum(int(flags.sum()) for flags in self.kept)


class Chooser:
    """Drops duplicates and what lies beyond a dataset's limits, datasets in the order in which they are given.

    Of equal texts in one role the first stays. Takes 8 bytes for each document of a role, some 30 while it sorts.
    """

    def __init__(self, drop_duplicates: bool) -> None:
        self._drop = drop_duplicates
        self._seen: dict[Role, np.ndarray] = {}

    def choose(self, dataset: DatasetSpec, jobs: Sequence[Job]) -> Chosen:
        """From the pieces that are finished; jobs in order, all finished."""
        pieces = [_arrays(job, "identities", "lengths") for job in jobs]
        sizes = [len(piece["lengths"]) for piece in pieces]
        identities = np.concatenate([np.empty(0, np.uint64), *(piece["identities"] for piece in pieces)])
        lengths = np.concatenate([np.empty(0, np.int64), *(piece["lengths"] for piece in pieces)])
        flags = self._first(dataset.role, identities)
        unique = flags.copy()
        full, needed = False, len(identities)
        counted = [
            (np.cumsum(flags), dataset.max_documents),
            (np.cumsum(np.where(flags, lengths, 0)), dataset.max_tokens),
        ]
        for total, limit in counted:
            if limit is None:
                continue
            flags &= total <= limit
            reached = np.flatnonzero(total >= limit)
            if len(reached):
                full, needed = True, min(needed, int(reached[0]) + 1)
        ends = np.cumsum(sizes)
        last = int(np.searchsorted(ends, needed)) + 1 if full else len(jobs)
        stop = int(ends[last - 1]) if last else 0
        kept = np.split(flags[:stop], ends[: last - 1]) if last else []
        return Chosen(
            jobs=tuple(jobs[:last]),
            kept=tuple(kept),
            duplicates=int((~unique[:stop]).sum()),
            tokens=int(lengths[:stop][flags[:stop]].sum()),
            full=full,
        )

    def settle(self, dataset: DatasetSpec, chosen: Chosen) -> None:
        """Later datasets of the role must not have these documents again."""
        if not self._drop:
            return
        parts = [_arrays(job, "identities")["identities"][k] for job, k in zip(chosen.jobs, chosen.kept, strict=True)]
        before = self._seen.get(dataset.role, np.empty(0, np.uint64))
        self._seen[dataset.role] = np.unique(np.concatenate([before, *parts]))

    def _first(self, role: Role, identities: np.ndarray) -> np.ndarray:
        """[documents] bool: the first of its text, in this dataset and those settled before."""
        if not self._drop:
            return np.ones(len(identities), dtype=bool)
        flags = np.zeros(len(identities), dtype=bool)
        flags[np.unique(identities, return_index=True)[1]] = True
        return flags & ~np.isin(identities, self._seen.get(role, np.empty(0, np.uint64)))


def _arrays(job: Job, *names: str) -> dict[str, np.ndarray]:
    with np.load(job.output + ".npz") as data:
        return {name: data[name] for name in names}


def write_dataset(prefix: Path, dtype: np.dtype, chosen: Chosen, storage: Storage, score_key: str) -> dict[str, Any]:
    """The files of one dataset; the manifest's fields about them. Masks and scores are written where there are any."""
    names = ("lengths", "spans", *(("scores",) if score_key else ()))
    pieces = [_arrays(job, *names) for job in chosen.jobs]
    lengths = [piece["lengths"] for piece in pieces]
    written: TokenFiles = storage.write_documents(
        prefix, dtype, [Path(job.output + ".bin") for job in chosen.jobs], lengths, chosen.kept
    )
    about: dict[str, Any] = {
        "documents": written.documents,
        "tokens": written.tokens,
        "bin_bytes": written.bin_bytes,
        "bin_sha256": written.bin_sha256,
        "idx_sha256": written.idx_sha256,
        "bin_sample_sha256": sampled_sha256(Path(f"{prefix}.bin")),
        "idx_sample_sha256": sampled_sha256(Path(f"{prefix}.idx")),
    }
    tokens = [int(part[keep].sum(dtype=np.int64)) for part, keep in zip(lengths, chosen.kept, strict=True)]
    spans = unlearned_spans.joined(
        [
            unlearned_spans.without_documents(piece["spans"], piece["lengths"], keep)
            for piece, keep in zip(pieces, chosen.kept, strict=True)
        ],
        tokens,
    )
    if len(spans):
        digest = unlearned_spans.write(prefix, unlearned_spans.SUFFIX, spans)
        masked = int((spans[:, 1] - spans[:, 0]).sum())
        about |= {"masked_tokens": masked, "mask_spans": len(spans), "mask_sha256": digest}
    if score_key:
        scores = np.concatenate([piece["scores"][keep] for piece, keep in zip(pieces, chosen.kept, strict=True)])
        digest = unlearned_spans.write(prefix, unlearned_spans.SCORE_SUFFIX, scores)
        low, high, mean = float(scores.min()), float(scores.max()), float(scores.mean(dtype=np.float64))
        about["scores"] = {"key": score_key, "min": low, "mean": mean, "max": high, "sha256": digest}
    return about
