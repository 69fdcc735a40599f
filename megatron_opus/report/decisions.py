"""What the ledger says, read in one pass over its parts with memory that does not grow with them.

    per bin of steps    candidates and chosen ones by domain; quantiles of the standardised utility
    per sequence        times offered and chosen, mean standardised utility (see `Tally`)
    for the whole run   why candidates were excluded

Standardised: (utility - mean) / standard deviation over the finite utilities of one step's candidates, since their
unit follows the learning rate and the gradients and may change by orders of magnitude within a run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_opus.runs.ledger import ledger_parts, read_rows

BINS = 60  # of steps: as many points as a picture has
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MAX_VALUES = 200_000  # utilities of a bin from which quantiles are taken: more are thinned evenly
MAX_SEQUENCES = 2_000_000  # sequences that are counted one by one: of more, a fixed part by a hash of the id
BATCH_ROWS = 1 << 16
MERGE_ROWS = 1 << 20
NEEDED = ("step", "sample_id", "domain", "utility", "selected")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiplicative hashing (Knuth, TAOCP 3, 6.4)


@dataclass(kw_only=True)
class Decisions:
    """B bins of steps, D domains. Where a strategy wrote no utilities, the quantiles are NaN."""

    domains: list[str]
    step: np.ndarray  # [B] float64: middle of each bin
    offered: np.ndarray  # [B, D] int64
    chosen: np.ndarray  # [B, D] int64
    standardised: np.ndarray  # [B, 2, 5] float64: not chosen, chosen; QUANTILES of the standardised utility
    domain_utility: np.ndarray  # [D] float64: mean standardised utility; NaN without utilities
    tally: Tally
    rows: int
    first: int
    last: int  # step
    excluded: Counter[str]
    notes: list[str] = field(default_factory=list)

    @property
    def has_utility(self) -> bool:
        return bool(np.isfinite(self.standardised).any())


class Tally:
    """Times offered and chosen, and the sum of standardised utilities, for each sequence; arrays sorted by id."""

    def __init__(self, most: int = MAX_SEQUENCES) -> None:
        self.ids = np.empty(0, dtype=np.int64)
        self.domain = np.empty(0, dtype=np.int32)
        self.offered = np.empty(0, dtype=np.int64)
        self.chosen = np.empty(0, dtype=np.int64)
        self.utility = np.empty(0, dtype=np.float64)  # sum over the offers that have one
        self.scored = np.empty(0, dtype=np.int64)  # how many have one
        self.halvings = 0  # 1 / 2^halvings of the ids are counted
        self._most = most
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, domain: np.ndarray, chosen: np.ndarray, standardised: np.ndarray) -> None:
        """Rows of the ledger, [n] each."""
        self._waiting.append((ids, domain, chosen, standardised))
        if sum(len(rows[0]) for rows in self._waiting) >= MERGE_ROWS:
            self.merge()

    def merge(self) -> None:
        """Count the rows that were added since the last call: sorting them in one go is what makes this fast."""
        if not self._waiting:
            return
        ids, domain, chosen, standardised = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting = []
        kept = self._kept(ids)
        ids, domain, chosen, standardised = ids[kept], domain[kept], chosen[kept], standardised[kept]
        finite = np.isfinite(standardised)
        unique, first, place = np.unique(np.concatenate([self.ids, ids]), return_index=True, return_inverse=True)

        def summed(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            return np.bincount(place, np.concatenate([old, new]), len(unique)).astype(old.dtype)

        self.offered = summed(self.offered, np.ones(len(ids)))
        self.chosen = summed(self.chosen, chosen)
        self.utility = summed(self.utility, np.where(finite, standardised, 0.0))
        self.scored = summed(self.scored, finite)
        self.domain = np.concatenate([self.domain, domain])[first]
        self.ids = unique
        while len(self.ids) > self._most:
            self.halvings += 1
            keep = self._kept(self.ids)
            for name in ("ids", "domain", "offered", "chosen", "utility", "scored"):
                setattr(self, name, getattr(self, name)[keep])

    def _kept(self, ids: np.ndarray) -> np.ndarray:
        if not self.halvings:
            return np.ones(len(ids), dtype=bool)
        return (ids.astype(np.uint64) * _MIX) >> np.uint64(64 - self.halvings) == 0


def scan(directory: Path, bins: int = BINS, most_sequences: int = MAX_SEQUENCES) -> Decisions | None:
    """Read the ledger in `directory`; None where it has no readable row. Unreadable parts are in the notes."""
    found = ledger_parts(directory) if directory.is_dir() else []
    if not found:
        return None
    first, last = found[0][0], max(end for _, end, _ in found)
    bins = min(bins, last - first + 1)
    state = _Scan(first, last, bins, Tally(most_sequences))
    notes: list[str] = []
    taken, repeated = first - 1, 0  # last step that has been read
    for start, end, path in found:
        if start > taken + 1:
            notes.append(f"The ledger has no rows for steps {taken + 1:,} to {start - 1:,}.")
        try:
            for steps in _whole_steps(path, state.names, state.reasons):
                repeated += int((steps.step <= taken).sum())
                state.add(steps.after(taken))
        except (pa.ArrowException, OSError, ValueError) as error:
            notes.append(f"{path.name} cannot be read, so its steps {start:,} to {end:,} are left out: {_short(error)}")
        taken = max(taken, end)
    if repeated:
        notes.append(f"{repeated:,} rows of steps that two parts of the ledger cover are counted once.")
    return state.finish(notes) if state.rows else None


@dataclass(frozen=True, kw_only=True)
class _LedgerRows:
    step: np.ndarray
    ids: np.ndarray
    domain: np.ndarray  # int32, numbers of names
    utility: np.ndarray
    selected: np.ndarray
    excluded: np.ndarray  # int32, numbers of reasons; -1: it could be drawn

    def slice(self, start: int, stop: int | None = None) -> _LedgerRows:
        return _LedgerRows(**{name: getattr(self, name)[start:stop] for name in self.__dataclass_fields__})

    def after(self, step: int) -> _LedgerRows:
        return self.slice(int(np.searchsorted(self.step, step, side="right")))


def _whole_steps(path: Path, names: dict[str, int], reasons: dict[str, int]) -> Iterator[_LedgerRows]:
    """Rows in batches that never cut a step; words are numbered in the order in which they are met.

    Raises ValueError for a part without a column that is needed.
    """
    there = set(pq.read_schema(path).names)
    if missing := [name for name in NEEDED if name not in there]:
        raise ValueError(f"expected the columns {', '.join(NEEDED)}, it lacks {', '.join(missing)}")
    columns = [*NEEDED, *(["excluded"] if "excluded" in there else [])]
    carried: list[_LedgerRows] = []
    for batch in read_rows(path).select(columns).to_batches(max_chunksize=BATCH_ROWS):
        rows = _rows(batch, names, reasons)
        if (np.diff(rows.step) < 0).any():
            raise ValueError("expected its rows in the order of their steps")
        whole = int(np.searchsorted(rows.step, rows.step[-1])) if len(rows.step) else 0
        if whole:
            yield _joined([*carried, rows.slice(0, whole)])
            carried = []
        carried.append(rows.slice(whole))
    if carried:
        yield _joined(carried)


def _rows(batch: pa.RecordBatch, names: dict[str, int], reasons: dict[str, int]) -> _LedgerRows:
    def numbered(column: str, known: dict[str, int]) -> np.ndarray:
        values = batch[column]
        table = [known.setdefault(word, len(known)) for word in values.dictionary.to_pylist()]
        codes = values.indices.fill_null(len(table)).to_numpy(zero_copy_only=False)
        return np.array([*table, -1], dtype=np.int32)[codes]

    return _LedgerRows(
        step=batch["step"].to_numpy(),
        ids=batch["sample_id"].to_numpy(),
        domain=numbered("domain", names),
        utility=np.asarray(batch["utility"].to_numpy(zero_copy_only=False), dtype=np.float64),
        selected=batch["selected"].to_numpy(zero_copy_only=False).astype(bool),
        excluded=numbered("excluded", reasons)
        if "excluded" in batch.schema.names
        else np.full(batch.num_rows, -1, dtype=np.int32),
    )


def _joined(pieces: Sequence[_LedgerRows]) -> _LedgerRows:
    return _LedgerRows(**{n: np.concatenate([getattr(p, n) for p in pieces]) for n in _LedgerRows.__dataclass_fields__})


def standardise(step: np.ndarray, utility: np.ndarray) -> np.ndarray:
    """[n]: utilities of whole steps, NaN where they were not finite or all of a step were equal. Population std."""
    if not len(step):
        return utility
    starts = np.flatnonzero(np.diff(step, prepend=step[0] - 1))
    finite = np.isfinite(utility)
    count = np.add.reduceat(finite.astype(np.float64), starts)
    of_step = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(step)))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, utility, 0.0), starts) / count
        centred = np.where(finite, utility - mean[of_step], 0.0)
        deviation = np.sqrt(np.add.reduceat(centred**2, starts) / count)
        return np.where(finite & (deviation[of_step] > 0), centred / deviation[of_step], math.nan)


class _Values:
    """Utilities of one bin and one fate: all of them, or evenly thinned ones where there are too many."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._size, self._every, self._seen = 0, 1, 0

    def add(self, values: np.ndarray) -> None:
        kept = values[-self._seen % self._every :: self._every]
        self._seen += len(values)
        self._pieces.append(kept)
        self._size += len(kept)
        while self._size > MAX_VALUES:
            self._pieces = [np.concatenate(self._pieces)[::2]]
            self._size, self._every = len(self._pieces[0]), 2 * self._every

    @property
    def thinned(self) -> bool:
        return self._every > 1

    def quantiles(self) -> np.ndarray:
        values = np.concatenate(self._pieces) if self._pieces else np.empty(0)
        return np.quantile(values, QUANTILES) if len(values) else np.full(len(QUANTILES), math.nan)


class _Scan:
    """Sums while the rows go by. Only the bin that the rows are in holds utilities."""

    def __init__(self, first: int, last: int, bins: int, tally: Tally) -> None:
        self.first, self.last, self.bins, self.rows = first, last, bins, 0
        self.names: dict[str, int] = {}
        self.reasons: dict[str, int] = {}
        self._tally = tally
        self._counts: Counter[tuple[int, int, bool]] = Counter()
        self._quantiles = np.full((bins, 2, len(QUANTILES)), math.nan)
        self._domain_sums: Counter[int] = Counter()
        self._domain_scored: Counter[int] = Counter()
        self._excluded: Counter[int] = Counter()
        self._open = -1
        self._values = [_Values(), _Values()]  # not chosen, chosen
        self._thinned = False

    def add(self, rows: _LedgerRows) -> None:
        if not len(rows.step):
            return
        self.rows += len(rows.step)
        domain = rows.domain
        standard = standardise(rows.step, rows.utility)
        scored = np.isfinite(standard)
        self._tally.add(rows.ids, domain, rows.selected, standard)
        for number, count in zip(*np.unique(rows.excluded[rows.excluded >= 0], return_counts=True), strict=True):
            self._excluded[int(number)] += int(count)
        for d in np.unique(domain).tolist():
            of = scored & (domain == d)
            self._domain_sums[d] += float(standard[of].sum())  # type: ignore[assignment]
            self._domain_scored[d] += int(of.sum())
        bin_ = (rows.step - self.first) * self.bins // (self.last - self.first + 1)
        for b in np.unique(bin_).tolist():
            here = slice(*np.searchsorted(bin_, [b, b + 1]).tolist())
            keys, counts = np.unique(2 * domain[here] + rows.selected[here], return_counts=True)
            for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
                self._counts[b, key // 2, bool(key % 2)] += count
            self._collect(b, rows.selected[here], standard[here])

    def _collect(self, b: int, selected: np.ndarray, standard: np.ndarray) -> None:
        if b != self._open:
            self._close()
            self._open = b
        finite = np.isfinite(standard)
        for fate in (0, 1):
            self._values[fate].add(standard[finite & (selected == bool(fate))])

    def _close(self) -> None:
        if self._open >= 0:
            for fate in (0, 1):
                self._quantiles[self._open, fate] = self._values[fate].quantiles()
                self._thinned |= self._values[fate].thinned
            self._values = [_Values(), _Values()]

    def finish(self, notes: list[str]) -> Decisions:
        self._close()
        names = list(self.names)
        self._tally.merge()
        offered = np.zeros((self.bins, len(names)), dtype=np.int64)
        chosen = np.zeros_like(offered)
        for (b, d, fate), count in self._counts.items():
            offered[b, d] += count
            chosen[b, d] += count if fate else 0
        if self._thinned:
            notes.append(f"Quantiles of the utility are of about {MAX_VALUES:,} evenly spaced values per bin of steps.")
        if self._tally.halvings:
            notes.append(
                f"More than {MAX_SEQUENCES:,} sequences were offered: those counted one by one are one "
                f"in {2**self._tally.halvings:,}, by a hash of the id."
            )
        sums = np.array([self._domain_sums[d] for d in range(len(names))], dtype=np.float64)
        scored = np.array([self._domain_scored[d] for d in range(len(names))], dtype=np.float64)
        width = (self.last - self.first + 1) / self.bins
        return Decisions(
            domains=names,
            step=self.first + (np.arange(self.bins) + 0.5) * width,
            offered=offered,
            chosen=chosen,
            standardised=self._quantiles,
            domain_utility=np.divide(sums, scored, out=np.full(len(names), math.nan), where=scored > 0),
            tally=self._tally,
            rows=self.rows,
            first=self.first,
            last=self.last,
            excluded=Counter({reason: self._excluded[number] for reason, number in self.reasons.items()}),
            notes=notes,
        )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
