"""Hugging Face datasets that are streamed: fetched once, in order, into Parquet parts that the rest reads like files.

A part is complete when its marker exists, and the marker has the state of the stream behind it: an interrupted fetching
goes on with the document after the last complete part. Only the columns that are read are kept. Where the datasets made
of a stream are limited, fetching stops when each of them has enough.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_opus.data.prepare.document import (
    ReadOptions,
    Shard,
    SourceError,
    SourceRecord,
    read_record,
    record_digest,
)
from megatron_opus.data.prepare.tabular import check_columns
from megatron_opus.files import atomic_file, write_json

HUB_PREFIX = "hub:"
_MORE = 1.1  # documents that are fetched for one that is wanted: some will be duplicates, held out or contaminated
_SPARE = 100
_EVERY = 16  # of so many documents one is tokenized, to know how many tokens a stream has given so far
_BYTES_PER_TOKEN = 6.0  # where the tokenizer is not made yet: more than any usual one needs


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one dataset takes from a stream. accepts: which records are its own (split, bucket)."""

    options: ReadOptions
    accepts: Callable[[SourceRecord, int], bool]  # record, split hash
    max_documents: int | None
    max_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A stream on disk. exhausted: there was no more of it."""

    shards: tuple[Shard, ...]
    identity: dict[str, Any]
    exhausted: bool


@dataclass(frozen=True, kw_only=True)
class StreamName:
    name: str  # of the repository, or a local directory
    config: str | None
    split: str
    revision: str | None

    @staticmethod
    def parse(source: str) -> StreamName:
        """Of `hub:NAME[@CONFIG][:SPLIT][#REVISION]`. Raises SourceError."""
        found = re.fullmatch(r"hub:([^@:#]+)(?:@([^@:#]+))?(?::([^@:#]+))?(?:#([^@:#]+))?", source)
        if found is None:
            raise SourceError(
                f"{source!r}: expected hub:NAME[@CONFIG][:SPLIT][#REVISION], as hub:HuggingFaceFW/fineweb"
            )
        name, config, split, revision = found.groups()
        return StreamName(name=name, config=config, split=split or "train", revision=revision)


def open_stream(stream: StreamName, revision: str | None) -> Any:
    """An IterableDataset at one revision."""
    import datasets

    at = {} if revision is None or Path(stream.name).exists() else {"revision": revision}
    return datasets.load_dataset(stream.name, stream.config, split=stream.split, streaming=True, **at)


def revision_of(stream: StreamName) -> str:
    """The commit that a name stands for now; of a local directory a digest over its files' names, sizes and times.

    An interrupted fetching must go on with the same one.
    """
    path = Path(stream.name)
    if path.exists():
        files = sorted(f for f in path.rglob("*") if f.is_file())
        stats = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:40]
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(stream.name, revision=stream.revision).sha)


def fetch(
    source: str,
    wanted: Sequence[Wanted],
    directory: Path,
    part_bytes: int,
    count_tokens: Callable[[str], int] | None,
    progress: bool,
) -> Fetched:
    """Bring what is wanted of a stream into `directory`, or take up an interrupted fetching there.

    part_bytes: of text in a part. count_tokens: of a document; None where the tokenizer is still to be made. Raises
    SourceError where the stream cannot be opened, has not the columns, no documents, changed since or breaks off.
    """
    stream = StreamName.parse(source)
    directory.mkdir(parents=True, exist_ok=True)
    parts = _finished_parts(directory)
    last = parts[-1] if parts else None
    if last is None or not last["done"]:
        try:
            revision = revision_of(stream)
            if last is not None and stream.revision is None and not Path(stream.name).exists():
                revision = last["revision"]  # the name may stand for a newer one by now
            opened = open_stream(stream, revision)
        except SourceError:
            raise
        except Exception as error:  # the libraries raise many kinds
            raise SourceError(f"{source}: datasets could not open it: {_short(error)}") from error
        if last is not None and last["revision"] != revision:
            raise SourceError(f"{source}: has changed since its fetching began; remove {directory.parent.parent}")
        _Fetching(source, wanted, directory, part_bytes, count_tokens, progress).run(opened, revision, parts)
    last = parts[-1]
    if last["documents"] == 0:
        raise SourceError(f"{source}: the stream has no documents")
    shards, base = [], 0
    for number, part in enumerate(parts):
        path = _part(directory, number)
        if part["documents"] > base:
            shards.append(Shard(source=str(path), start=0, stop=1, bytes=path.stat().st_size, origin=source, base=base))
        base = part["documents"]
    names = ("revision", "documents", "bytes", "digest", "exhausted")
    identity = {"path": source, **{name: last[name] for name in names}}
    return Fetched(shards=tuple(shards), identity=identity, exhausted=last["exhausted"])


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _part(directory: Path, number: int) -> Path:
    return directory / f"part-{number:06d}.parquet"


def _finished_parts(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while (marker := _part(directory, len(found)).with_suffix(".json")).exists():
        found.append(json.loads(marker.read_text(encoding="utf-8")))
    return found


class _Need:
    """How much of a stream one limited dataset has got so far."""

    def __init__(self, wanted: Wanted, count_tokens: Callable[[str], int] | None, state: dict[str, int] | None) -> None:
        self._wanted, self._count = wanted, count_tokens
        self.state = dict(state or {"documents": 0, "bytes": 0, "sampled_bytes": 0, "sampled_tokens": 0})

    def add(self, row: dict[str, Any]) -> None:
        record = read_record(0, row, self._wanted.options, 0)
        if record.text is None or not self._wanted.accepts(record, record_digest(record)[1]):
            return
        state, size = self.state, len(record.text.encode("utf-8"))
        if self._wanted.max_tokens is not None and self._count is not None and state["documents"] % _EVERY == 0:
            state["sampled_bytes"] += size
            state["sampled_tokens"] += self._count(record.text)
        state["documents"] += 1
        state["bytes"] += size

    @property
    def met(self) -> bool:
        state, wanted = self.state, self._wanted
        enough = []
        if wanted.max_documents is not None:
            enough.append(state["documents"] >= _MORE * wanted.max_documents + _SPARE)
        if wanted.max_tokens is not None:
            per_byte = 1 / _BYTES_PER_TOKEN
            if self._count is not None:
                per_byte = state["sampled_tokens"] / max(1, state["sampled_bytes"])
            spare = state["documents"] >= _SPARE
            enough.append(spare and state["bytes"] * per_byte >= _MORE * wanted.max_tokens)
        return any(enough)  # the dataset ends at the first of its limits


class _Fetching:
    def __init__(
        self,
        source: str,
        wanted: Sequence[Wanted],
        directory: Path,
        part_bytes: int,
        count_tokens: Callable[[str], int] | None,
        progress: bool,
    ) -> None:
        self._source, self._directory, self._part_bytes = source, directory, part_bytes
        self._wanted, self._count, self._progress = wanted, count_tokens, progress
        self._columns = list(dict.fromkeys(name for w in wanted for name in w.options.columns))

    def run(self, opened: Any, revision: str, parts: list[dict[str, Any]]) -> None:
        """Add finished parts to `parts` until nothing more is wanted or there."""
        if opened.column_names is not None:
            for wanted in self._wanted:
                check_columns(self._source, opened.column_names, wanted.options)
        opened = opened.select_columns(self._columns)
        last: dict[str, Any] = parts[-1] if parts else {"documents": 0, "bytes": 0, "digest": "", "needs": None}
        limited = [w for w in self._wanted if w.max_documents is not None or w.max_tokens is not None]
        states = last["needs"] or [None] * len(limited)
        needs = [_Need(w, self._count, state) for w, state in zip(limited, states, strict=True)]
        if parts:
            opened.load_state_dict(last["state"])
        documents, size, digest = last["documents"], last["bytes"], last["digest"]
        rows: list[dict[str, Any]] = []
        held = 0
        with tqdm(
            desc="fetching  ", initial=documents, unit=" documents", disable=not self._progress, mininterval=0.5
        ) as bar:

            def finish(*, done: bool, exhausted: bool) -> None:
                nonlocal rows, held, digest
                digest = self._write(len(parts), rows, digest)
                marker = {
                    "revision": revision,
                    "documents": documents,
                    "bytes": size,
                    "digest": digest,
                    "needs": [need.state for need in needs],
                    "state": None if done else opened.state_dict(),
                    "done": done,
                    "exhausted": exhausted,
                }
                write_json(_part(self._directory, len(parts)).with_suffix(".json"), marker)
                parts.append(marker)
                bar.update(len(rows))
                rows, held = [], 0

            for row in self._rows(opened, documents):
                for need in needs:
                    need.add(row)
                rows.append(row)
                text = row.get(self._columns[0])
                length = len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0
                documents, size, held = documents + 1, size + length, held + length
                if needs and all(need.met for need in needs):
                    finish(done=True, exhausted=False)
                    return
                if held >= self._part_bytes:
                    finish(done=False, exhausted=False)
            finish(done=True, exhausted=True)

    def _rows(self, opened: Any, documents: int) -> Iterator[dict[str, Any]]:
        iterator = iter(opened)
        # Closed by hand: what the library has open behind it would be torn down in any order at exit.
        with contextlib.closing(iterator):
            while True:
                try:
                    row = next(iterator)
                except StopIteration:
                    return
                except Exception as error:  # the library raises many kinds
                    raise SourceError(
                        f"{self._source}: the stream broke off after {documents} documents ({_short(error)}); the same "
                        "command goes on behind the last complete part"
                    ) from error
                documents += 1
                yield row

    def _write(self, number: int, rows: Sequence[dict[str, Any]], digest: str) -> str:
        """Write a part; the digest of everything up to here."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        running = hashlib.sha256(digest.encode())
        for row in rows:
            running.update(json.dumps([row.get(name) for name in self._columns], default=str).encode())
        try:
            columns = {name: pa.array([row.get(name) for row in rows]) for name in self._columns}
            for text in {w.options.text_key for w in self._wanted}:
                columns[text] = pa.array([row.get(text) for row in rows], pa.string())
        except (pa.ArrowException, TypeError) as error:
            raise SourceError(f"{self._source}: column {self._columns[0]!r}: expected strings ({error})") from error
        with atomic_file(_part(self._directory, number)) as stream:
            pq.write_table(pa.table(columns), stream, compression="zstd", row_group_size=max(1, len(rows)))
        return running.hexdigest()
