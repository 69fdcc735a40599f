"""Text files to token streams: plan, hash what is held out, make the tokenizer, tokenize shards, join, describe.

Every stage leaves finished pieces under `<output>/.work`, so that a run killed at any moment is taken up where it
stopped, and gives the same bytes as a run that was never interrupted, with any number of workers. The manifest is
written last: a directory that has one is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tqdm import tqdm

from megatron_opus.data import manifest as manifests
from megatron_opus.data import tokenizers
from megatron_opus.data.files import PARTIAL, atomic_file, locked, write_json
from megatron_opus.data.manifest import DatasetEntry, Manifest, Role
from megatron_opus.data.plan import (
    TRAIN_SENTENCEPIECE,
    WORK_DIRECTORY,
    DatasetSpec,
    PrepareConfig,
    PrepareError,
    check_finished,
    describe_settings,
    plan_work,
    recorded,
    resolve,
)
from megatron_opus.data.records import (
    DATASETS_PREFIX,
    Shard,
    read_shard,
    source_identity,
    text_digest,
)
from megatron_opus.data.shards import MAX_LISTED, Job, contains, kept, record_error
from megatron_opus.data.worker import run_jobs


class WrittenFiles(Protocol):
    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str


class Storage(Protocol):
    """The on-disk token format; `megatron_opus.backends.indexed` is one."""

    def token_dtype(self, vocab_size: int) -> np.dtype: ...

    def write_documents(
        self, prefix: str | Path, dtype: np.dtype, streams: Iterable[Path], lengths: Sequence[np.ndarray]
    ) -> Any: ...


def prepare(config: PrepareConfig, storage: Storage, log: Callable[[str], None] = tqdm.write) -> Manifest:
    """Prepare `config.output`, or take up an interrupted preparation of it; returns the manifest.

    A directory already prepared with the same settings is left as it is. Raises PrepareError (and the errors of
    `records`, `tokenizers`, `shards` and `worker`, all ValueError or RuntimeError) with what to change.
    """
    datasets = resolve(config)
    source = None if config.tokenizer == TRAIN_SENTENCEPIECE else tokenizers.load(config.tokenizer, config.eod)
    settings = describe_settings(config, datasets, source)
    config.output.mkdir(parents=True, exist_ok=True)
    busy = f"{config.output}: another preparation is writing here; wait or stop it"
    with locked(config.output / ".lock", busy) as held:
        if not held:
            log(f"{config.output}: this file system has no locks; make sure that no other preparation writes here")
        for stale in config.output.glob(f"*{PARTIAL}"):
            stale.unlink()
        if (config.output / manifests.FILE_NAME).exists():
            done = check_finished(config.output, settings)
            log(f"{config.output}: already prepared with these settings")
            shutil.rmtree(config.output / WORK_DIRECTORY, ignore_errors=True)
            return done
        shards = plan_work(config, settings, datasets)
        work = _Work(config, datasets, shards)
        work.hash_held_out()
        description = work.make_tokenizer(source, log)
        entries = work.tokenize(description, storage, log)
        result = Manifest(
            tokenizer=description, datasets=entries, settings=settings, provenance=dict(config.provenance)
        )
        manifests.write(config.output, result)
        shutil.rmtree(config.output / WORK_DIRECTORY)
    return result


# --- stages ---------------------------------------------------------------------------------------------------------


class _Work:
    """The stages, over one resolved plan."""

    def __init__(self, config: PrepareConfig, datasets: Sequence[DatasetSpec], shards: dict[str, list[Shard]]) -> None:
        self.config = config
        self.datasets = datasets
        self.shards = shards
        self.root = config.output / WORK_DIRECTORY
        self._source_index = {source: i for i, source in enumerate(shards)}

    def _run(self, title: str, jobs: Sequence[Job]) -> None:
        for job in jobs:
            Path(job.output).parent.mkdir(parents=True, exist_ok=True)
        results = [(job, job.result()) for job in jobs]
        tokens = sum(int(result.get("tokens", 0)) for _, result in results if result is not None)
        with tqdm(
            total=sum(j.shard.bytes for j in jobs),
            initial=sum(j.shard.bytes for j, result in results if result is not None),
            desc=title,
            unit="B",
            unit_scale=True,
            disable=not self.config.progress,
            mininterval=0.5,
        ) as bar:

            def report(read: int, written: int) -> None:
                nonlocal tokens
                tokens += written
                if tokens:
                    bar.set_postfix_str(f"{tokens / 1e6:.2f}M tokens", refresh=False)
                bar.update(read)

            run_jobs([job for job, result in results if result is None], self.config.workers, report)

    def _job(self, kind: Literal["hashes", "tokens"], dataset: DatasetSpec, shard: Shard, number: int) -> Job:
        return Job(
            kind=kind,
            output=str(self.root / kind / dataset.role / dataset.name / f"{number:06d}"),
            shard=shard,
            options=self.config.read,
            keep=dataset.keep,
            on_error=self.config.on_error,
        )

    def _jobs(self, kind: Literal["hashes", "tokens"], dataset: DatasetSpec) -> list[Job]:
        parts = [shard for source in dataset.sources for shard in self.shards[source]]
        return [self._job(kind, dataset, shard, i) for i, shard in enumerate(parts)]

    def _forbidden(self, role: Role) -> Path:
        return self.root / f"forbidden-{role}.npy"

    def hash_held_out(self) -> None:
        """Hash the sources and the documents that lower roles must not have, before anything is tokenized."""
        checksums = [self._checksum_job(s) for s in self.shards if not s.startswith(DATASETS_PREFIX)]
        held = [d for d in self.datasets if d.role != "candidates"]
        jobs = {id(d): self._jobs("hashes", d) for d in held}
        self._run("hashing   ", [*checksums, *(job for d in held for job in jobs[id(d)])])
        for role, above in (("proxy", ("validation",)), ("candidates", ("validation", "proxy"))):
            parts = [np.load(job.output + ".npy") for d in held if d.role in above for job in jobs[id(d)]]
            merged = np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)
            with atomic_file(self._forbidden(role)) as stream:  # type: ignore[arg-type]
                np.save(stream, merged)

    def _checksum_job(self, source: str) -> Job:
        size = Path(source).stat().st_size
        output = str(self.root / "sources" / f"{self._source_index[source]:06d}")
        return Job(kind="sha256", output=output, shard=Shard(source=source, start=0, stop=size, bytes=size))

    def make_tokenizer(self, source: tokenizers.Tokenizer | None, log: Callable[[str], None]) -> dict[str, Any]:
        marker = self.root / "tokenizer.json"
        directory = self.config.output / manifests.TOKENIZER_DIRECTORY
        if marker.exists():
            description = json.loads(marker.read_text(encoding="utf-8"))
            tokenizers.reopen(directory, description)
            return description
        if source is None:
            log(f"training SentencePiece, {self.config.vocab_size} pieces")
            source = tokenizers.train_sentencepiece(self._sample(), self.config.vocab_size)
        description = source.save(directory)
        write_json(marker, description)
        return description

    def _sample(self) -> Iterator[str]:
        """Candidate text for the tokenizer: the beginning of every shard, in proportion to the sources' sizes."""
        forbidden = np.load(self._forbidden("candidates"))
        jobs = [job for d in self.datasets if d.role == "candidates" for job in self._jobs("tokens", d)]
        share = min(1.0, self.config.tokenizer_bytes / max(1, sum(job.shard.bytes for job in jobs)))
        for job in jobs:
            left = job.shard.bytes * share
            for record in read_shard(job.shard, job.options):
                if left <= 0:
                    break
                left -= record.bytes
                if record.text is None:
                    if job.on_error == "stop":
                        raise record_error(job.shard, record)
                    continue
                identity, split = text_digest(record.text)
                if kept(split, job.keep) and not contains(forbidden, identity):
                    yield record.text

    def tokenize(self, description: dict[str, Any], storage: Storage, log: Callable[[str], None]) -> list[DatasetEntry]:
        dtype = storage.token_dtype(int(description["vocab_size"]))
        directory = str(self.config.output / manifests.TOKENIZER_DIRECTORY)
        jobs = {
            id(d): [
                replace(
                    job,
                    tokenizer=(directory, description),
                    dtype=dtype.name,
                    forbidden=None if d.role == "validation" else str(self._forbidden(d.role)),
                )
                for job in self._jobs("tokens", d)
            ]
            for d in self.datasets
        }
        self._run("tokenizing", [job for d in self.datasets for job in jobs[id(d)]])
        entries = [self._join(d, jobs[id(d)], dtype, storage) for d in self.datasets]
        for entry in entries:
            _tell_skipped(entry, log)
        return entries

    def _join(self, dataset: DatasetSpec, jobs: Sequence[Job], dtype: np.dtype, storage: Storage) -> DatasetEntry:
        marker = self.root / f"joined-{dataset.role}-{dataset.name}.json"
        if marker.exists():
            return DatasetEntry(**json.loads(marker.read_text(encoding="utf-8")))
        results = [job.result() for job in jobs]
        found = [r for r in results if r is not None]
        counts = {k: sum(r[k] for r in found) for k in ("documents", "held_out", "empty", "skipped")}
        if counts["documents"] == 0:
            raise PrepareError(
                f"dataset {dataset.name} ({dataset.role}): no document is left ({counts['held_out']} held out, "
                f"{counts['empty']} empty, {counts['skipped']} skipped); give more documents, another --holdout or, "
                "for .txt files, --txt-documents paragraph or line"
            )
        prefix = f"{dataset.role}/{dataset.name}"
        written: WrittenFiles = storage.write_documents(
            self.config.output / prefix,
            dtype,
            [Path(job.output + ".bin") for job in jobs],
            [np.load(job.output + ".lengths.npy") for job in jobs],
        )
        entry = DatasetEntry(
            name=dataset.name,
            role=dataset.role,
            prefix=prefix,
            dtype=dtype.name,
            documents=written.documents,
            tokens=written.tokens,
            bin_bytes=written.bin_bytes,
            bin_sha256=written.bin_sha256,
            idx_sha256=written.idx_sha256,
            sources=[self._describe_source(source) for source in dataset.sources],
            held_out=counts["held_out"],
            empty=counts["empty"],
            skipped=counts["skipped"],
            skipped_records=[r for f in found for r in f["skipped_records"]][:MAX_LISTED],
        )
        write_json(marker, manifests.entry_dict(entry))
        return entry

    def _describe_source(self, source: str) -> dict[str, Any]:
        if source.startswith(DATASETS_PREFIX):
            return source_identity(source)
        job = self._checksum_job(source)
        result = job.result()
        if result is None:
            raise PrepareError(f"{source}: its checksum is missing; remove {self.root} and prepare again")
        return {"path": recorded(self.config.output, source), "bytes": job.shard.bytes, "sha256": result["sha256"]}


def _tell_skipped(entry: DatasetEntry, log: Callable[[str], None]) -> None:
    if not entry.skipped:
        return
    shown = entry.skipped_records[:20]
    log(f"{entry.name} ({entry.role}): {entry.skipped} malformed records skipped")
    for record in shown:
        log(f"  {record['file']}:{record['line']}: {record['problem']}")
    if entry.skipped > len(shown):
        log(f"  and {entry.skipped - len(shown)} more, see {manifests.FILE_NAME}")
