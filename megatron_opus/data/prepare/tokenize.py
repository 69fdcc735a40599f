"""One piece of preparation work: a shard of a source in, hashes or tokens on disk out.

A job is plain JSON, so that it can be sent to a worker process and kept in the plan. It is finished when its `.json`
marker exists; everything else under its name is redone. What a job writes depends on the job alone, never on the
process that runs it or on what ran before.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from megatron_opus.data import unlearned_spans
from megatron_opus.data.prepare.decontaminate import Benchmarks, Overlap
from megatron_opus.data.prepare.records import (
    ReadOptions,
    Shard,
    SourceRecord,
    file_sha256,
    line_base,
    read_shard,
    record_digest,
)
from megatron_opus.data.tokenizers.base import Tokenizer, reopen_tokenizer
from megatron_opus.errors import Refusal
from megatron_opus.files import atomic_file, write_json

MAX_LISTED = 1000  # malformed records named in the manifest, per dataset; all of them are counted
PROBED = 1 << 16  # characters of each piece whose tokens are turned to text again
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 256
_SPLIT_RANGE = float(1 << 53)

Report = Callable[[int, int], None]  # bytes read, tokens written


class RecordError(Refusal, ValueError):
    """A malformed record, named by file and line."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """kind: sha256 (of the source file), hashes (of the documents, sorted) or tokens.

    keep: the documents whose split hash, as a share of its range, lies in [keep[0], keep[1]). bucket: those whose
    number (options.bucket_key, or the score) lies in [bucket[0], bucket[1]].
    """

    kind: Literal["sha256", "hashes", "tokens"]
    output: str  # files of this job: output + .json and others
    shard: Shard
    options: ReadOptions = field(default_factory=ReadOptions)
    keep: tuple[float, float] = (0.0, 1.0)
    bucket: tuple[float, float] | None = None
    forbidden: str | None = None  # .npy of sorted uint64 text hashes that must not come through
    benchmarks: str | None = None  # of decontaminate.build: documents that overlap one must not come through
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
        data["bucket"] = None if data["bucket"] is None else tuple(data["bucket"])
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
        self._tokenizers: dict[str, Tokenizer] = {}
        self._forbidden: dict[str, np.ndarray] = {}
        self._benchmarks: dict[str, Benchmarks] = {}

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
            identity, split = record_digest(record)
            if kept(split, job.keep) and in_bucket(record.bucket, job.bucket):
                found.append(identity)
        report(read, 0)
        with atomic_file(job.output + ".npy") as stream:
            np.save(stream, np.unique(np.array(found, dtype=np.uint64)))
        return {"documents": len(found)}

    def gate(self, job: Job) -> Gate:
        """What decides which documents of the job come through."""
        if job.benchmarks is not None and job.benchmarks not in self._benchmarks:
            self._benchmarks[job.benchmarks] = Benchmarks.load(Path(job.benchmarks))
        benchmarks = None if job.benchmarks is None else self._benchmarks[job.benchmarks]
        return Gate(job, self._forbidden_hashes(job.forbidden), benchmarks)

    def _tokens(self, job: Job, report: Report) -> dict[str, Any]:
        gate = self.gate(job)
        skipped = 0
        problems: list[dict[str, Any]] = []
        with atomic_file(job.output + ".bin") as stream:
            out = _TokenWriter(self._tokenizer(job), job, stream, report)
            for record in read_shard(job.shard, job.options):
                out.read += record.bytes
                if record.text is None:
                    if job.on_error == "stop":
                        raise record_error(job.shard, record)
                    skipped += 1
                    if len(problems) < MAX_LISTED:
                        problems.append({"line": record.line, "problem": record.problem})
                    continue
                if (identity := gate.admit(record)) is not None:
                    out.add(record, identity)
            out.flush()
        with atomic_file(job.output + ".npz") as stream:
            np.savez(stream, **out.arrays(job.options))  # type: ignore[arg-type]
        base = line_base(job.shard) if problems or gate.overlaps else 0
        listed = [{"file": job.shard.shown, "line": base + p["line"], "problem": p["problem"]} for p in problems]
        if gate.overlaps:
            with atomic_file(job.output + ".removed.jsonl") as stream:
                for line, overlap in gate.overlaps:
                    entry = {"file": job.shard.shown, "line": base + line, **asdict(overlap)}
                    stream.write((json.dumps(entry) + "\n").encode("ascii"))
        counts = {"documents": len(out.lengths), "tokens": sum(out.lengths), "skipped": skipped, **gate.counts()}
        counts["empty"] += out.without_tokens
        probe = {"probed_characters": out.probed, "lost_characters": dict(out.lost.most_common(MAX_LISTED))}
        return {**counts, **probe, "skipped_records": listed}

    def _tokenizer(self, job: Job) -> Tokenizer:
        if job.tokenizer is None:
            raise ValueError("a tokens job needs a tokenizer")
        directory, description = job.tokenizer
        if directory not in self._tokenizers:
            self._tokenizers[directory] = reopen_tokenizer(directory, description)
        return self._tokenizers[directory]

    def _forbidden_hashes(self, path: str | None) -> np.ndarray:
        if path is None:
            return np.empty(0, dtype=np.uint64)
        if path not in self._forbidden:
            self._forbidden[path] = np.load(path, mmap_mode="r")
        return self._forbidden[path]


class Gate:
    """Which documents of a job come through, with a count of the others by reason."""

    def __init__(self, job: Job, forbidden: np.ndarray, benchmarks: Benchmarks | None) -> None:
        self._job, self._forbidden, self._benchmarks = job, forbidden, benchmarks
        self._held_out = self._empty = 0
        self.overlaps: list[tuple[int, Overlap]] = []  # line of the record in its shard

    def admit(self, record: SourceRecord) -> int | None:
        """The identity of a document that comes through; None for one that does not."""
        identity, split = record_digest(record)
        if not kept(split, self._job.keep) or not in_bucket(record.bucket, self._job.bucket):
            return None
        text = record.text or ""
        if not (text[record.body :] if record.body else text).strip():
            self._empty += 1
        elif contains(self._forbidden, identity):
            self._held_out += 1
        elif self._benchmarks is not None and (overlap := self._benchmarks.find(text)) is not None:
            self.overlaps.append((record.line, overlap))
        else:
            return identity
        return None

    def counts(self) -> dict[str, int]:
        return {"held_out": self._held_out, "empty": self._empty, "contaminated": len(self.overlaps)}


class _TokenWriter:
    """Documents to tokens in batches, with what is kept beside the tokens.

    Of the first PROBED characters of a piece the tokens are turned to text again: what the text has and the tokens
    have not is counted. A document that gives no token at all is left out and counted.
    """

    def __init__(self, tokenizer: Tokenizer, job: Job, stream: BinaryIO, report: Report) -> None:
        self._tokenizer, self._job, self._stream, self._report = tokenizer, job, stream, report
        self._batch: list[tuple[SourceRecord, int]] = []
        self._characters = self._tokens = 0
        self.read = 0  # bytes since the last report
        self.lengths: list[int] = []
        self._identities: list[int] = []
        self._scores: list[float] = []
        self._spans: list[np.ndarray] = []
        self.without_tokens = self.probed = 0
        self.lost: Counter[str] = Counter()

    def add(self, record: SourceRecord, identity: int) -> None:
        self._batch.append((record, identity))
        self._characters += len(record.text or "")
        if self._characters >= _BATCH_CHARACTERS or len(self._batch) >= _BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        plain = iter(self._tokenizer.encode_batch([r.text or "" for r, _ in self._batch if not r.spans]))
        before = self._tokens
        tokens: list[int] = []
        for record, identity in self._batch:
            if record.spans:
                ids, starts, ends = self._tokenizer.offsets(record.text or "")
            else:
                ids = next(plain)
            self._examine(record, ids)
            if not ids:
                self.without_tokens += 1
                continue
            if record.spans:
                self._spans.append(self._tokens + unlearned_spans.token_spans(starts, ends, record.spans))
            tokens += ids
            tokens.append(self._tokenizer.eod)
            self.lengths.append(len(ids) + 1)
            self._identities.append(identity)
            self._scores.append(math.nan if record.score is None else record.score)
            self._tokens += len(ids) + 1
        self._stream.write(np.array(tokens, dtype=self._job.dtype).tobytes())
        self._report(self.read, self._tokens - before)
        self._batch, self._characters, self.read = [], 0, 0

    def _examine(self, record: SourceRecord, ids: Sequence[int]) -> None:
        text = record.text or ""
        if self._tokenizer.eod in ids:
            shard = self._job.shard
            raise RecordError(
                f"{shard.shown}:{line_base(shard) + record.line}: the text itself gives the token that ends a document "
                f"(id {self._tokenizer.eod}); choose a token with --eod that no text gives, or another tokenizer"
            )
        if self.probed < PROBED or not ids:
            self.probed += len(text)
            self.lost += Counter(text) - Counter(self._tokenizer.decode(ids))

    def arrays(self, options: ReadOptions) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {
            "lengths": np.array(self.lengths, dtype=np.int32),
            "identities": np.array(self._identities, dtype=np.uint64),
            "spans": np.concatenate([np.empty((0, 2), dtype=np.int64), *self._spans]),
        }
        return {**found, "scores": np.array(self._scores, dtype=np.float32)} if options.score_key else found


def in_bucket(number: float | None, bucket: tuple[float, float] | None) -> bool:
    """Whether a number lies in the closed range `bucket`; anything does where there is none."""
    return bucket is None or (number is not None and bucket[0] <= number <= bucket[1])


def contains(sorted_hashes: np.ndarray, identity: int) -> bool:
    """Whether a text hash is in an ascending uint64 array."""
    value = np.uint64(identity)
    at = int(np.searchsorted(sorted_hashes, value))
    return at < len(sorted_hashes) and sorted_hashes[at] == value


def kept(split: int, keep: tuple[float, float]) -> bool:
    """Whether the split hash of a document falls into the part `keep` of the range."""
    # 53 bits: the division is then exact and never rounds up to 1.
    return keep[0] <= (split >> 11) / _SPLIT_RANGE < keep[1]


def record_error(shard: Shard, record: SourceRecord) -> RecordError:
    """The error for a record without text, with its line in the whole file."""
    return RecordError(
        f"{shard.shown}:{line_base(shard) + record.line}: {record.problem}; repair the record or leave such records "
        "out with --on-error skip"
    )
