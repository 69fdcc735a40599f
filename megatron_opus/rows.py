"""Rows of JSON Lines and Parquet files, each with the number by which an error names it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_opus.errors import Refusal

_BATCH_ROWS = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowError(Refusal, ValueError):
    """A file of rows that cannot be read: the message names file and line."""


def json_lines(
    file: str | Path, lines: Iterable[bytes], problem: str = "not one JSON object per line"
) -> Iterator[tuple[int, Any]]:
    """Read (line from 1, value) of every line that is not blank.

    Raises RowError, with `problem` in its message, for broken JSON and for text that is not UTF-8.
    """
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            yield number, json.loads(raw.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            hint = "; a JSON array is to be written as one object per line" if raw.lstrip()[:1] == b"[" else ""
            raise RowError(f"{file}:{number}: {problem} ({error}){hint}") from error


def parquet_rows(
    file: str | Path, problem: str = "not a Parquet file, or a damaged one"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read (row from 1, values by column), a few hundred rows in memory at a time.

    Raises RowError, with `problem` in its message, for a file that is no Parquet or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise RowError(f"{file}: {problem} after row {number}: {error}") from error
