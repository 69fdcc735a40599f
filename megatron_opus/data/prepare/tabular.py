"""Documents out of tables: Parquet files and Hugging Face datasets that are on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_opus.data.prepare.document import ReadOptions, Shard, SourceError, SourceRecord, read_record

DATASETS_PREFIX = "datasets:"
_ROWS = 256  # read at once


def check_columns(source: str, found: Sequence[str], options: ReadOptions) -> None:
    """Raises SourceError naming the first column that is needed and missing, or there more than once."""
    for column in options.columns:
        if column not in found:
            hint = "; see --text-key" if column == options.text_key else ""
            raise SourceError(f"{source}: expected a column {column!r}, found {', '.join(found)}{hint}")
        if (times := list(found).count(column)) > 1:
            raise SourceError(
                f"{source}: expected one column {column!r}, found {times}; write the file again with one of them"
            )


# --- Parquet --------------------------------------------------------------------------------------------------------


def plan_parquet(source: str, size: int, shard_bytes: int, options: ReadOptions) -> list[Shard]:
    """Row groups put together to about `shard_bytes`. Raises SourceError: no Parquet, no such column, no rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{source}: not a Parquet file, or a truncated one: {error}") from error
    with file:
        schema = file.schema_arrow
        check_columns(source, schema.names, options)
        kind = schema.field(options.text_key).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(plain) not in ("string", "large_string", "string_view"):
            raise SourceError(f"{source}: column {options.text_key!r}: expected strings, found {kind}")
        if file.metadata.num_rows == 0:
            raise SourceError(f"{source}: the file has no rows")
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    total = max(sum(groups), 1)
    shards, start, held = [], 0, 0
    for i, group in enumerate(groups):
        held += group
        if held >= shard_bytes or i == len(groups) - 1:
            shards.append(Shard(source=source, start=start, stop=i + 1, bytes=size * held // total))
            start, held = i + 1, 0
    return shards


def read_parquet(shard: Shard, options: ReadOptions) -> Iterator[SourceRecord]:
    """Raises SourceError where the pages of a row group are damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(shard.source) as file:
            row = sum(file.metadata.row_group(i).num_rows for i in range(shard.start))
            groups = range(shard.start, shard.stop)
            rows = max(1, sum(file.metadata.row_group(i).num_rows for i in groups))
            for batch in file.iter_batches(_ROWS, row_groups=list(groups), columns=list(options.columns)):
                columns = {name: batch.column(name) for name in options.columns}
                for i in range(batch.num_rows):
                    row += 1
                    yield _arrow_record(row, columns, i, options, shard.bytes // rows)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{shard.shown}: damaged after row {shard.base + row} of the row groups {shard.start}.."
            f"{shard.stop - 1}: {error}; restore the file"
        ) from error


def _arrow_record(row: int, columns: Mapping[str, Any], i: int, options: ReadOptions, size: int) -> SourceRecord:
    values = {}
    for name, column in columns.items():
        try:
            values[name] = column[i].as_py()
        except UnicodeDecodeError as error:
            return SourceRecord(line=row, text=None, problem=f"{name!r}: invalid UTF-8 ({error.reason})", bytes=size)
    return read_record(row, values, options, size)


# --- datasets -------------------------------------------------------------------------------------------------------


def plan_dataset(source: str, options: ReadOptions) -> list[Shard]:
    dataset = open_dataset(source)
    check_columns(source, dataset.column_names, options)
    rows = len(dataset)
    if rows == 0:
        raise SourceError(f"{source}: the dataset has no rows")
    size = max(int(dataset.data.nbytes), rows)
    step = 10_000
    return [
        Shard(source=source, start=s, stop=min(s + step, rows), bytes=size * min(step, rows - s) // rows)
        for s in range(0, rows, step)
    ]


def open_dataset(source: str) -> Any:
    """Hugging Face dataset of `datasets:NAME[@CONFIG][:SPLIT]` (NAME may be a local directory; SPLIT: train)."""
    import datasets

    name = source.removeprefix(DATASETS_PREFIX)
    name, _, split = name.partition(":")
    name, _, config = name.partition("@")
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds
        raise SourceError(f"{source}: datasets could not load it: {error}") from error


def read_dataset(shard: Shard, options: ReadOptions) -> Iterator[SourceRecord]:
    dataset = open_dataset(shard.source).select_columns(list(options.columns))
    rows = max(1, shard.stop - shard.start)
    for start in range(shard.start, shard.stop, _ROWS):
        stop = min(start + _ROWS, shard.stop)
        columns: Mapping[str, list[Any]] = dataset[start:stop]
        for i in range(stop - start):
            values = {name: columns[name][i] for name in options.columns}
            yield read_record(start + i + 1, values, options, shard.bytes // rows)
