"""The decision ledger: one Parquet row per candidate that was ever offered, and what became of it.

Rows are kept in memory and written as parts, each named by the steps that it covers. A part appears complete or not at
all; what was not written when a process dies is written again by the run that resumes from the last checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_opus.errors import Refusal
from megatron_opus.files import PARTIAL, atomic_file
from megatron_opus.types import Candidates, Selection, Signals

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("sample_id", pa.int64()),
        ("domain", pa.dictionary(pa.int32(), pa.string())),
        ("alignment", pa.float64()),  # null: the strategy did not need it
        ("redundancy", pa.float64()),  # at the draw; at the end for those never drawn
        ("utility", pa.float64()),
        ("selected", pa.bool_()),
        ("draw_order", pa.int32()),  # -1: not selected
        ("finite", pa.bool_()),
        ("excluded", pa.dictionary(pa.int32(), pa.string())),  # why it could not be drawn; null: it could
    ]
)
# What can be wrong with a candidate, in the order in which it is looked for. A sequence without any token that counts
# in its scoring window has no mean loss and is found under the first.
REASONS = ("non-finite loss", "non-finite alignment", "non-finite factors")
ROWS_DIGEST = b"megatron_opus.rows_sha256"  # of a part's metadata; parts of earlier releases have none
_PART = re.compile(r"steps-(\d+)-(\d+)\.parquet")


class LedgerError(Refusal, ValueError):
    """A ledger that cannot be read, or with steps twice, out of order or missing."""


class LedgerWriter:
    """Appends the decisions of each step to `directory`. One process writes; the others keep none."""

    def __init__(self, directory: str | Path, domains: Sequence[str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._domains = pa.array(list(domains), pa.string())
        self._rows: list[pa.RecordBatch] = []
        self._first: int | None = None
        parts = ledger_parts(self.directory)
        self._last = parts[-1][1] if parts else -1

    def append(self, candidates: Candidates, signals: Signals, selection: Selection) -> None:
        """Keep the N rows of one step until `flush`.

        Raises LedgerError unless the step comes after the ones that are already there (see `truncate`).
        """
        if candidates.step <= self._last:
            raise LedgerError(
                f"ledger {self.directory}: step {candidates.step} after step {self._last}; a resumed run must call "
                "truncate(step) first"
            )
        n = len(candidates)
        order = np.full(n, -1, dtype=np.int32)
        chosen = selection.indices.detach().cpu().numpy()
        order[chosen] = np.arange(len(chosen), dtype=np.int32)
        finite = np.ones(n, dtype=bool) if signals.finite is None else signals.finite.detach().cpu().numpy()
        columns = [
            pa.array(np.full(n, candidates.step, dtype=np.int64)),
            pa.array(np.asarray(candidates.sample_ids, dtype=np.int64)),
            pa.DictionaryArray.from_arrays(pa.array(candidates.domains, pa.int32()), self._domains),
            *(_floats(x, n) for x in (signals.alignment, selection.redundancy, selection.utility)),
            pa.array(order >= 0),
            pa.array(order),
            pa.array(finite),
            pa.DictionaryArray.from_arrays(exclusions(signals, n), pa.array(REASONS, pa.string())),
        ]
        self._rows.append(pa.record_batch(columns, schema=SCHEMA))
        self._first = candidates.step if self._first is None else self._first
        self._last = candidates.step

    def flush(self) -> Path | None:
        """Write the rows kept since the last flush as one part; None when there are none."""
        if self._first is None:
            return None
        path = self.directory / f"steps-{self._first:08d}-{self._last:08d}.parquet"
        with atomic_file(path) as stream:
            write_part(pa.Table.from_batches(self._rows, SCHEMA), stream)
        self._rows, self._first = [], None
        return path

    def truncate(self, step: int) -> None:
        """Forget every row of `step` and later ones, on disk and in memory: the run continues at `step`."""
        self._rows, self._first = [], None
        for stale in self.directory.glob(f"*{PARTIAL}"):
            stale.unlink()
        self._last = -1
        for first, last, path in ledger_parts(self.directory):
            if first >= step:
                path.unlink()
            elif last >= step:
                table = read_part(path)
                kept = table.filter(pc.less(table["step"], step))
                self._last = int(pc.max(kept["step"]).as_py())
                # Both parts exist for a moment; a process that dies in it leaves an overlap, which the next truncate
                # resolves as it resolved this one.
                with atomic_file(self.directory / f"steps-{first:08d}-{self._last:08d}.parquet") as stream:
                    write_part(kept, stream)
                path.unlink()
            else:
                self._last = max(self._last, last)


def exclusions(signals: Signals, n: int) -> pa.Array:
    """[n] int32: index into REASONS for a candidate that was not to be drawn, null for the others."""
    reason = np.full(n, -1, dtype=np.int32)
    if signals.finite is not None:
        reason[~signals.finite.detach().cpu().numpy()] = REASONS.index("non-finite factors")
        for name, values in (("non-finite alignment", signals.alignment), ("non-finite loss", signals.loss)):
            if values is not None:
                reason[(reason >= 0) & ~np.isfinite(values.detach().cpu().numpy())] = REASONS.index(name)
    return pa.array(reason, mask=reason < 0)


def read_ledger(directory: str | Path, complete: bool = True) -> pa.Table:
    """All rows in order of steps. complete: raise LedgerError for a missing step, or rows of a step in two parts."""
    parts = ledger_parts(Path(directory))
    if not parts:
        return SCHEMA.empty_table()
    for (_, last, path), (first, _, after) in itertools.pairwise(parts):
        if first <= last:
            raise LedgerError(f"ledger: {path.name} and {after.name} cover the same steps; call truncate when resuming")
    table = pa.concat_tables([read_part(path) for _, _, path in parts]).unify_dictionaries()
    steps = np.unique(table["step"].to_numpy())
    pairs = table.group_by(["step", "sample_id"]).aggregate([([], "count_all")])
    if pairs.num_rows != table.num_rows:
        raise LedgerError(f"ledger {directory}: {table.num_rows - pairs.num_rows} rows name a sample twice in one step")
    if complete and len(steps) != steps[-1] - steps[0] + 1:
        missing = sorted(set(range(int(steps[0]), int(steps[-1]) + 1)) - set(steps.tolist()))
        raise LedgerError(f"ledger {directory}: {len(missing)} steps are missing, the first is {missing[0]}")
    return table


def write_part(table: pa.Table, stream: BinaryIO) -> None:
    """Write one part with page checksums and, since those cover no header and no footer, a digest of its rows."""
    marked = table.replace_schema_metadata({ROWS_DIGEST: rows_sha256(table)})
    pq.write_table(marked, stream, compression="zstd", write_page_checksum=True)


def rows_sha256(table: pa.Table) -> str:
    """Compute the SHA-256 of what a part says, in whatever way its columns are chunked or its domains numbered."""
    digest = hashlib.sha256(str(table.num_rows).encode())
    for field in SCHEMA:
        column = table[field.name].combine_chunks()
        if pa.types.is_dictionary(field.type):
            # numbers in order of appearance: how the file numbers the same names is no part of what it says
            column = column.cast(pa.string()).dictionary_encode()
            digest.update(repr(column.dictionary.to_pylist()).encode())
            column = column.indices
        digest.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).tobytes())
        zero = pa.scalar(0, pa.int8()).cast(column.type)
        digest.update(np.ascontiguousarray(column.fill_null(zero).to_numpy(zero_copy_only=False)).tobytes())
    return digest.hexdigest()


def read_part(path: Path) -> pa.Table:
    """Read one part, compared with its checksums, the digest of its rows and the steps in its name.

    Raises LedgerError where it is not what was written.
    """
    table = read_rows(path)
    named = _PART.fullmatch(path.name)
    first, last = (int(named[1]), int(named[2])) if named else (0, 1 << 62)
    found = pc.min_max(table["step"]).as_py()
    if table["step"].null_count or not (found["min"] == first and found["max"] == last):
        raise LedgerError(
            f"{path} cannot be read: expected the steps {first} to {last} by its name, found {found['min']} to "
            f"{found['max']}; bring it back from a copy, or move it away"
        )
    return table


def read_rows(path: Path) -> pa.Table:
    """Read the rows of one part; columns that it lacks are null. Raises LedgerError where its contents have changed."""
    try:
        table = pq.read_table(path, schema=SCHEMA, page_checksum_verification=True).replace_schema_metadata(None)
        table.validate(full=True)
        written = (pq.read_schema(path).metadata or {}).get(ROWS_DIGEST)
        now = written and rows_sha256(table).encode()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise LedgerError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): bring it back from a copy, or move it away to go "
            "on without the decisions of its steps"
        ) from error
    if now != written:
        raise LedgerError(
            f"{path} is damaged: its rows are not those that were written; bring it back from a copy, or move it away "
            "to go on without the decisions of its steps"
        )
    return table


def usage(table: pa.Table) -> pa.Table:
    """sample_id, domain, offered, used: how often each sequence was a candidate and was trained on, by id."""
    counted = table.append_column("used", pc.cast(table["selected"], pa.int64()))
    counted = counted.group_by(["sample_id", "domain"]).aggregate([("used", "count"), ("used", "sum")])
    return counted.rename_columns(["sample_id", "domain", "offered", "used"]).sort_by("sample_id")


def ledger_parts(directory: Path) -> list[tuple[int, int, Path]]:
    """(first step, last step, path) of the parts, in order."""
    found = [(m, path) for path in directory.glob("steps-*.parquet") if (m := _PART.fullmatch(path.name))]
    return sorted((int(m[1]), int(m[2]), path) for m, path in found)


def _floats(values: Any, n: int) -> pa.Array:
    if values is None:
        return pa.nulls(n, pa.float64())
    return pa.array(values.detach().cpu().double().numpy())
