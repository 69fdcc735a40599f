"""One piece of preparation work: a shard of a source in, hashes or tokens on disk out.

A job is plain JSON, so that it can be sent to a worker process and kept in the plan. It is finished when its `.json`
marker exists; everything else under its name is redone. What a job writes depends on the job alone, never on the
process that runs it or on what ran before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_opus.data import tokenizers
from megatron_opus.data.files import atomic_file, write_json
from megatron_opus.data.records import ReadOptions, Record, Shard, file_sha256, line_base, read_shard, text_digest

MAX_LISTED = 1000  # malformed records named in the manifest, per dataset; all of them are counted
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 256
_SPLIT_RANGE = float(1 << 53)

Report = Callable[[int, int], None]  # bytes read, tokens written


class RecordError(ValueError):
    """A malformed record, named by file and line."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """kind: sha256 (of the source file), hashes (of the documents, sorted) or tokens.

    keep: the documents whose split hash, as a share of its range, lies in [keep[0], keep[1]).
    """

    kind: Literal["sha256", "hashes", "tokens"]
    output: str  # files of this job: output + .json and others
    shard: Shard
    options: ReadOptions = field(default_factory=ReadOptions)
    keep: tuple[float, float] = (0.0, 1.0)
    forbidden: str | None = None  # .npy of sorted uint64 text hashes that must not come through
    tokenizer: tuple[str, dict[str, Any]] | None = None  # directory, description
    dtype: str = "int32"
    on_error: Literal["stop", "skip"] = "stop"

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Job:
        data = json.loads(text)
        data["shard"] = Shard(**data["shard"])
        data["options"] = ReadOptions(**data["options"])
        data["keep"] = tuple(data["keep"])
        return Job(**data)

    def result(self) -> dict[str, Any] | None:
        """What the finished job found out; None while it is not finished."""
        try:
            return json.loads(Path(self.output + ".json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None


class JobRunner:
    """Runs jobs one after the other, keeping the tokenizer and the forbidden hashes open between them."""

    def __init__(self) -> None:
        self._tokenizers: dict[str, tokenizers.Tokenizer] = {}
        self._forbidden: dict[str, np.ndarray] = {}

    def run(self, job: Job, report: Report) -> dict[str, Any]:
        """Do the job and write its marker. Raises RecordError on a malformed record unless on_error is skip."""
        if job.kind == "sha256":
            result: dict[str, Any] = {"sha256": file_sha256(job.shard.source)}
            report(job.shard.bytes, 0)
        elif job.kind == "hashes":
            result = self._hashes(job, report)
        else:
            result = self._tokens(job, report)
        write_json(Path(job.output + ".json"), result)
        return result

    def _hashes(self, job: Job, report: Report) -> dict[str, Any]:
        found: list[int] = []
        read = 0
        for record in read_shard(job.shard, job.options):
            read += record.bytes
            if record.text is None:
                if job.on_error == "stop":
                    raise record_error(job.shard, record)
                continue
            identity, split = text_digest(record.text)
            if kept(split, job.keep):
                found.append(identity)
        report(read, 0)
        with atomic_file(job.output + ".npy") as stream:
            np.save(stream, np.unique(np.array(found, dtype=np.uint64)))
        return {"documents": len(found)}

    def _tokens(self, job: Job, report: Report) -> dict[str, Any]:
        tokenizer = self._tokenizer(job)
        forbidden = self._forbidden_hashes(job.forbidden)
        lengths: list[int] = []
        counts = {"held_out": 0, "empty": 0, "skipped": 0, "tokens": 0}
        problems: list[dict[str, Any]] = []
        batch: list[str] = []
        characters = read = 0
        with atomic_file(job.output + ".bin") as stream:

            def flush() -> None:
                nonlocal batch, characters, read
                written = 0
                for ids in tokenizer.encode_batch(batch):
                    tokens = np.array([*ids, tokenizer.eod], dtype=np.int64)
                    stream.write(tokens.astype(job.dtype).tobytes())
                    lengths.append(len(tokens))
                    written += len(tokens)
                counts["tokens"] += written
                report(read, written)
                batch, characters, read = [], 0, 0

            for record in read_shard(job.shard, job.options):
                read += record.bytes
                if record.text is None:
                    if job.on_error == "stop":
                        raise record_error(job.shard, record)
                    counts["skipped"] += 1
                    if len(problems) < MAX_LISTED:
                        problems.append({"line": record.line, "problem": record.problem})
                    continue
                identity, split = text_digest(record.text)
                if not kept(split, job.keep):
                    continue
                if not record.text.strip():
                    counts["empty"] += 1
                elif contains(forbidden, identity):
                    counts["held_out"] += 1
                else:
                    batch.append(record.text)
                    characters += len(record.text)
                if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
                    flush()
            flush()
        with atomic_file(job.output + ".lengths.npy") as stream:
            np.save(stream, np.array(lengths, dtype=np.int32))
        base = line_base(job.shard) if problems else 0
        listed = [{"file": job.shard.source, "line": base + p["line"], "problem": p["problem"]} for p in problems]
        return {"documents": len(lengths), **counts, "skipped_records": listed}

    def _tokenizer(self, job: Job) -> tokenizers.Tokenizer:
        if job.tokenizer is None:
            raise ValueError("a tokens job needs a tokenizer")
        directory, description = job.tokenizer
        if directory not in self._tokenizers:
            self._tokenizers[directory] = tokenizers.reopen(directory, description)
        return self._tokenizers[directory]

    def _forbidden_hashes(self, path: str | None) -> np.ndarray:
        if path is None:
            return np.empty(0, dtype=np.uint64)
        if path not in self._forbidden:
            self._forbidden[path] = np.load(path, mmap_mode="r")
        return self._forbidden[path]


def contains(sorted_hashes: np.ndarray, identity: int) -> bool:
    """Whether a text hash is in an ascending uint64 array."""
    value = np.uint64(identity)
    at = int(np.searchsorted(sorted_hashes, value))
    return at < len(sorted_hashes) and sorted_hashes[at] == value


def kept(split: int, keep: tuple[float, float]) -> bool:
    """Whether the split hash of a document falls into the part `keep` of the range."""
    # 53 bits: the division is then exact and never rounds up to 1.
    return keep[0] <= (split >> 11) / _SPLIT_RANGE < keep[1]


def record_error(shard: Shard, record: Record) -> RecordError:
    """The error for a record without text, with its line in the whole file."""
    return RecordError(
        f"{shard.source}:{line_base(shard) + record.line}: {record.problem}; repair the record or leave such records "
        "out with --on-error skip"
    )
