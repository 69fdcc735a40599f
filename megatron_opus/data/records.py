"""Documents out of source files, a bounded piece at a time.

A source is a `.jsonl`, `.txt` or `.parquet` file or a Hugging Face dataset. It is cut into shards (byte ranges, row
groups, rows) that can be read on their own, in any process, and that give together every record exactly once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

SUFFIXES = (".jsonl", ".txt", ".parquet")
DATASETS_PREFIX = "datasets:"
TextDocuments = Literal["file", "paragraph", "line"]
_MAX_TXT_FILE = 1 << 28  # a document is tokenized in one piece, in memory


class SourceError(ValueError):
    """A source that cannot be read: names the file and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of one source. start, stop: bytes (.jsonl, .txt), row groups (.parquet) or rows (datasets)."""

    source: str
    start: int
    stop: int
    bytes: int  # for progress

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One document, or the reason why there is none (`text` is None)."""

    line: int  # from 1, of the shard; `line_base` gives what to add
    text: str | None
    problem: str = ""
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    text_key: str = "text"
    txt_documents: TextDocuments = "file"


def text_digest(text: str) -> tuple[int, int]:
    """(identity, split): two independent 64-bit hashes of a document, blind to differences in whitespace."""
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


# --- planning -------------------------------------------------------------------------------------------------------


def plan_shards(source: str, shard_bytes: int, options: ReadOptions) -> list[Shard]:
    """Cut a source into shards of about `shard_bytes`, after the checks that need no reading.

    Raises SourceError for a missing or empty file, an unknown suffix, a parquet file without the text column.
    """
    if source.startswith(DATASETS_PREFIX):
        return _plan_dataset(source, options)
    path = Path(source)
    if not path.is_file():
        raise SourceError(f"{source}: no such file")
    size = path.stat().st_size
    if path.suffix not in SUFFIXES:
        raise SourceError(f"{source}: expected a {', '.join(SUFFIXES)} file, got suffix {path.suffix!r}")
    if size == 0:
        raise SourceError(f"{source}: the file is empty")
    if path.suffix == ".parquet":
        return _plan_parquet(source, size, shard_bytes, options)
    if path.suffix == ".txt" and options.txt_documents != "line":
        if options.txt_documents == "file" and size > _MAX_TXT_FILE:
            raise SourceError(
                f"{source}: {size} bytes are too much for one document; choose --txt-documents paragraph or line"
            )
        return [Shard(source=source, start=0, stop=size, bytes=size)]
    starts = range(0, size, shard_bytes)
    return [
        Shard(source=source, start=s, stop=min(s + shard_bytes, size), bytes=min(shard_bytes, size - s)) for s in starts
    ]


def _plan_parquet(source: str, size: int, shard_bytes: int, options: ReadOptions) -> list[Shard]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{source}: not a Parquet file: {error}") from error
    with file:
        schema = file.schema_arrow
        if options.text_key not in schema.names:
            raise SourceError(
                f"{source}: expected a column {options.text_key!r}, found {', '.join(schema.names)}; see --text-key"
            )
        kind = schema.field(options.text_key).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
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


def _plan_dataset(source: str, options: ReadOptions) -> list[Shard]:
    dataset = open_dataset(source)
    if options.text_key not in dataset.column_names:
        raise SourceError(
            f"{source}: expected a column {options.text_key!r}, found {', '.join(dataset.column_names)}; see --text-key"
        )
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


def source_identity(source: str) -> dict[str, Any]:
    """What must not change between an interrupted run and the one that resumes it."""
    if source.startswith(DATASETS_PREFIX):
        return {"path": source, "fingerprint": str(open_dataset(source)._fingerprint)}
    stat = Path(source).stat()
    return {"path": source, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def file_sha256(path: str | Path) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 22):
        digest.update(chunk)
    return digest.hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------


def read_shard(shard: Shard, options: ReadOptions) -> Iterator[Record]:
    """Every record of a shard in order. Blank lines are no records."""
    if shard.source.startswith(DATASETS_PREFIX):
        yield from _read_dataset(shard, options)
    elif shard.source.endswith(".parquet"):
        yield from _read_parquet(shard, options)
    elif shard.source.endswith(".jsonl"):
        for line, raw in _lines(shard):
            yield _json_record(line, raw, options.text_key)
    elif options.txt_documents == "line":
        for line, raw in _lines(shard):
            yield _text_record(line, raw.rstrip(b"\r\n"), len(raw))
    else:
        yield from _read_txt(shard, options)


def line_base(shard: Shard) -> int:
    """Lines of the file before the first one of this shard. Reads the file up to there: for messages only."""
    if shard.start == 0 or not shard.source.endswith((".jsonl", ".txt")):
        return 0
    with Path(shard.source).open("rb") as stream:
        stream.seek(shard.start - 1)
        stream.readline()
        left = stream.tell()
        stream.seek(0)
        lines = 0
        while left > 0 and (chunk := stream.read(min(left, 1 << 22))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines


def _lines(shard: Shard) -> Iterator[tuple[int, bytes]]:
    """(line from 1, content with its line end) for the non-blank lines that start inside of the shard."""
    with Path(shard.source).open("rb") as stream:
        if shard.start > 0:
            # The line that holds the byte before `start` belongs to the shard before this one.
            stream.seek(shard.start - 1)
            stream.readline()
        position, line = stream.tell(), 0
        while position < shard.stop and (raw := stream.readline()):
            line += 1
            if position == 0:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            position = stream.tell()
            if raw.strip():
                yield line, raw


def _json_record(line: int, raw: bytes, key: str) -> Record:
    size = len(raw)
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Record(line=line, text=None, problem=f"invalid UTF-8 ({error.reason} at byte {error.start})", bytes=size)
    except (ValueError, RecursionError) as error:
        return Record(line=line, text=None, problem=f"broken JSON ({error})", bytes=size)
    if not isinstance(record, dict):
        problem = f"expected a JSON object, got {type(record).__name__}"
        return Record(line=line, text=None, problem=problem, bytes=size)
    if key not in record:
        keys = ", ".join(map(str, list(record)[:8])) or "none"
        return Record(line=line, text=None, problem=f"no key {key!r} (keys: {keys}); see --text-key", bytes=size)
    return _value_record(line, record[key], key, size)


def _value_record(line: int, value: Any, key: str, size: int) -> Record:
    if not isinstance(value, str):
        problem = f"{key!r}: expected a string, got {type(value).__name__}"
        return Record(line=line, text=None, problem=problem, bytes=size)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"{key!r}: a lone surrogate at character {error.start} is not text"
        return Record(line=line, text=None, problem=problem, bytes=size)
    return Record(line=line, text=value, bytes=size)


def _text_record(line: int, raw: bytes, size: int) -> Record:
    try:
        return Record(line=line, text=raw.decode("utf-8"), bytes=size)
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        return Record(line=line, text=None, problem=f"invalid UTF-8 ({error.reason})", bytes=size)


def _read_txt(shard: Shard, options: ReadOptions) -> Iterator[Record]:
    with Path(shard.source).open("rb") as stream:
        if options.txt_documents == "file":
            raw = stream.read().removeprefix(b"\xef\xbb\xbf")
            yield _text_record(1, raw, len(raw))
            return
        block: list[bytes] = []
        first = 1
        for line, part in enumerate(stream, 1):
            raw = part.removeprefix(b"\xef\xbb\xbf") if line == 1 else part
            if raw.strip():
                if not block:
                    first = line
                block.append(raw)
            elif block:
                yield _block_record(first, block)
                block = []
        if block:
            yield _block_record(first, block)


def _block_record(first: int, block: list[bytes]) -> Record:
    raw = b"".join(block)
    return _text_record(first, raw.rstrip(b"\r\n"), len(raw))


def _read_parquet(shard: Shard, options: ReadOptions) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard.source) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(shard.start))
        groups = range(shard.start, shard.stop)
        rows = max(1, sum(file.metadata.row_group(i).num_rows for i in groups))
        for batch in file.iter_batches(256, row_groups=list(groups), columns=[options.text_key]):
            for value in batch.column(0):
                row += 1
                yield _arrow_record(row, value, options.text_key, shard.bytes // rows)


def _arrow_record(row: int, value: Any, key: str, size: int) -> Record:
    try:
        return _value_record(row, value.as_py(), key, size)
    except UnicodeDecodeError as error:
        return Record(line=row, text=None, problem=f"{key!r}: invalid UTF-8 ({error.reason})", bytes=size)


def _read_dataset(shard: Shard, options: ReadOptions) -> Iterator[Record]:
    dataset = open_dataset(shard.source)
    rows = max(1, shard.stop - shard.start)
    for start in range(shard.start, shard.stop, 256):
        stop = min(start + 256, shard.stop)
        values: Mapping[str, list[Any]] = dataset[start:stop]
        for i, value in enumerate(values[options.text_key]):
            yield _value_record(start + i + 1, value, options.text_key, shard.bytes // rows)
