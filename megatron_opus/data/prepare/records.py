"""Documents out of source files, a bounded piece at a time.

A source is a `.jsonl`, `.txt` or `.parquet` file or a Hugging Face dataset. It is cut into shards (byte ranges, row
groups, rows) that can be read on their own, in any process, and that give together every record exactly once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opus.data.prepare.compressed import numbered_lines
from megatron_opus.data.prepare.document import (
    ReadOptions,
    Shard,
    SourceError,
    SourceRecord,
    read_record,
    record_digest,
    text_digest,
)
from megatron_opus.data.prepare.tabular import (
    DATASETS_PREFIX,
    open_dataset,
    plan_dataset,
    plan_parquet,
    read_dataset,
    read_parquet,
)

__all__ = [
    "COMPRESSED",
    "DATASETS_PREFIX",
    "SUFFIXES",
    "ReadOptions",
    "Shard",
    "SourceError",
    "SourceRecord",
    "file_sha256",
    "known_suffix",
    "line_base",
    "plan_shards",
    "read_shard",
    "record_digest",
    "source_identity",
    "text_digest",
]  # fmt: skip
COMPRESSED = (".jsonl.gz", ".jsonl.zst")
SUFFIXES = (".jsonl", ".txt", ".parquet", *COMPRESSED)
_MAX_TXT_FILE = 1 << 28  # a document is tokenized in one piece, in memory


def known_suffix(path: str | Path) -> str:
    """Which of SUFFIXES a file has, or its last suffix where it is none of them."""
    name = Path(path).name
    return next((s for s in COMPRESSED if name.endswith(s)), Path(path).suffix)


# --- planning -------------------------------------------------------------------------------------------------------


def plan_shards(source: str, shard_bytes: int, options: ReadOptions) -> list[Shard]:
    """Cut a source into shards of about `shard_bytes`, after the checks that need no reading.

    Raises SourceError for a missing or empty file, an unknown suffix, a parquet file without the text column.
    """
    if source.startswith(DATASETS_PREFIX):
        return plan_dataset(source, options)
    path = Path(source)
    if not path.is_file():
        raise SourceError(f"{source}: no such file")
    size = path.stat().st_size
    suffix = known_suffix(path)
    if suffix not in SUFFIXES:
        raise SourceError(f"{source}: expected a {', '.join(SUFFIXES)} file, got suffix {suffix!r}")
    if size == 0:
        raise SourceError(f"{source}: the file is empty")
    if suffix == ".parquet":
        return plan_parquet(source, size, shard_bytes, options)
    if suffix == ".txt" and not options.plain:
        raise SourceError(f"{source}: a .txt file has no keys for masks, metadata or scores; give .jsonl or .parquet")
    if suffix in COMPRESSED:  # no way to begin in the middle: more files give more workers something to do
        return [Shard(source=source, start=0, stop=size, bytes=size)]
    if suffix == ".txt" and options.txt_documents != "line":
        if options.txt_documents == "file" and size > _MAX_TXT_FILE:
            raise SourceError(
                f"{source}: {size} bytes are too much for one document; choose --txt-documents paragraph or line"
            )
        return [Shard(source=source, start=0, stop=size, bytes=size)]
    starts = range(0, size, shard_bytes)
    return [
        Shard(source=source, start=s, stop=min(s + shard_bytes, size), bytes=min(shard_bytes, size - s)) for s in starts
    ]


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


def read_shard(shard: Shard, options: ReadOptions) -> Iterator[SourceRecord]:
    """Every record of a shard in order. Blank lines are no records."""
    if shard.source.startswith(DATASETS_PREFIX):
        yield from read_dataset(shard, options)
    elif shard.source.endswith(".parquet"):
        yield from read_parquet(shard, options)
    elif shard.source.endswith(COMPRESSED):
        for line, raw in numbered_lines(shard.source):
            yield _json_record(line, raw, options)
    elif shard.source.endswith(".jsonl"):
        for line, raw in _lines(shard):
            yield _json_record(line, raw, options)
    elif options.txt_documents == "line":
        for line, raw in _lines(shard):
            yield _text_record(line, raw.rstrip(b"\r\n"), len(raw))
    else:
        yield from _read_txt(shard, options)


def line_base(shard: Shard) -> int:
    """Lines of the file before the first one of this shard. Reads the file up to there: for messages only."""
    if shard.origin:
        return shard.base
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


def _json_record(line: int, raw: bytes, options: ReadOptions) -> SourceRecord:
    size = len(raw)
    doubled: list[str] = []  # keys that the outermost object, which ends last, has more than once

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        doubled[:] = [] if len(found) == len(pairs) else [k for k, n in Counter(k for k, _ in pairs).items() if n > 1]
        return found

    try:
        record = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        return SourceRecord(
            line=line, text=None, problem=f"invalid UTF-8 ({error.reason} at byte {error.start})", bytes=size
        )
    except (ValueError, RecursionError) as error:
        return SourceRecord(line=line, text=None, problem=f"broken JSON ({error})", bytes=size)
    if not isinstance(record, dict):
        problem = f"expected a JSON object, got {type(record).__name__}"
        return SourceRecord(line=line, text=None, problem=problem, bytes=size)
    if twice := next((key for key in doubled if key in options.columns), None):
        return SourceRecord(line=line, text=None, problem=f"key {twice!r} is given more than once", bytes=size)
    return read_record(line, record, options, size)


def _text_record(line: int, raw: bytes, size: int) -> SourceRecord:
    try:
        return SourceRecord(line=line, text=raw.decode("utf-8"), bytes=size)
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        return SourceRecord(line=line, text=None, problem=f"invalid UTF-8 ({error.reason})", bytes=size)


def _read_txt(shard: Shard, options: ReadOptions) -> Iterator[SourceRecord]:
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


def _block_record(first: int, block: list[bytes]) -> SourceRecord:
    raw = b"".join(block)
    return _text_record(first, raw.rstrip(b"\r\n"), len(raw))
