"""Text files to token streams: plan, hash what is held out, make the tokenizer, tokenize shards, join, describe.

Every stage leaves finished pieces under `<output>/.work`, so that a run killed at any moment is taken up where it
stopped, and gives the same bytes as a run that was never interrupted, with any number of workers. The manifest is
written last: a directory that has one is complete.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from megatron_opus.data import manifest as manifests
from megatron_opus.data.manifest import DatasetEntry, Manifest, Role
from megatron_opus.data.prepare import decontaminate, hub_streams
from megatron_opus.data.prepare.assemble import Chooser, Chosen, Storage, write_dataset
from megatron_opus.data.prepare.records import DATASETS_PREFIX, Shard, SourceRecord, read_shard, source_identity
from megatron_opus.data.prepare.resolve import (
    TRAIN_SENTENCEPIECE,
    WORK_DIRECTORY,
    DatasetSpec,
    PrepareConfig,
    PrepareError,
    check_finished,
    describe_settings,
    plan_work,
    reads,
    recorded,
    resolve,
)
from megatron_opus.data.prepare.tokenize import MAX_LISTED, Job, JobRunner, in_bucket, kept, record_error
from megatron_opus.data.prepare.worker import run_jobs
from megatron_opus.data.tokenizers.base import Tokenizer, load_tokenizer, reopen_tokenizer, train_sentencepiece
from megatron_opus.files import PARTIAL, atomic_file, locked, write_json

__all__ = ["Storage", "prepare"]


def prepare(config: PrepareConfig, storage: Storage, log: Callable[[str], None] = tqdm.write) -> Manifest:
    """Prepare `config.output`, or take up an interrupted preparation of it; returns the manifest.

    A directory already prepared with the same settings is left as it is. Raises PrepareError (and the errors of
    `records`, `tokenizers`, `shards` and `worker`, all ValueError or RuntimeError) with what to change.
    """
    datasets = resolve(config, log)
    source = None if config.tokenizer == TRAIN_SENTENCEPIECE else load_tokenizer(config.tokenizer, config.eod)
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
        work = _Work(config, datasets, settings, source)
        benchmarks = work.read_benchmarks()
        work.hash_held_out()
        description = work.make_tokenizer(source, log)
        entries = work.tokenize(description, storage, log)
        result = Manifest(
            tokenizer=description,
            datasets=entries,
            settings=settings,
            provenance=dict(config.provenance),
            decontamination=benchmarks,
        )
        manifests.write(config.output, result)
        shutil.rmtree(config.output / WORK_DIRECTORY)
    return result


# --- stages ---------------------------------------------------------------------------------------------------------


class _Work:
    """The stages, over one resolved plan."""

    def __init__(
        self,
        config: PrepareConfig,
        datasets: Sequence[DatasetSpec],
        settings: dict[str, Any],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.config = config
        self.datasets = datasets
        self.root = config.output / WORK_DIRECTORY
        self._chooser = Chooser(config.duplicates == "drop")
        self._written, self._seconds = 0, 0.0

        def fetch(source: str, number: int) -> hub_streams.Fetched:
            self.read_benchmarks()  # first what may be refused, then what takes long
            wanted = [_wanted(config, d) for d in datasets if source in d.sources]
            count = None if tokenizer is None else lambda text: len(tokenizer.encode(text))
            place = self.root / "streams" / f"{number:06d}"
            return hub_streams.fetch(source, wanted, place, config.shard_bytes, count, config.progress)

        self.shards, self.fetched = plan_work(config, settings, datasets, fetch)
        self._source_index = {source: i for i, source in enumerate(self.shards)}

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

            started, before = time.perf_counter(), tokens
            run_jobs([job for job, result in results if result is None], self.config.workers, report)
        if tokens > before:
            self._seconds += time.perf_counter() - started
            self._written += tokens - before

    def _job(self, kind: Literal["hashes", "tokens"], dataset: DatasetSpec, shard: Shard, number: int) -> Job:
        return Job(
            kind=kind,
            output=str(self.root / kind / dataset.role / dataset.name / f"{number:06d}"),
            shard=shard,
            options=reads(self.config, dataset),
            keep=dataset.keep,
            bucket=dataset.bucket,
            on_error=self.config.on_error,
        )

    def _jobs(self, kind: Literal["hashes", "tokens"], dataset: DatasetSpec) -> list[Job]:
        parts = [shard for source in dataset.sources for shard in self.shards[source]]
        return [self._job(kind, dataset, shard, i) for i, shard in enumerate(parts)]

    def _forbidden(self, role: Role) -> Path:
        return self.root / f"forbidden-{role}.npy"

    def hash_held_out(self) -> None:
        """Hash the sources and the documents that lower roles must not have, before anything is tokenized."""
        checksums = [
            self._checksum_job(s) for s in self.shards if not s.startswith((DATASETS_PREFIX, hub_streams.HUB_PREFIX))
        ]
        held = [d for d in self.datasets if d.role != "candidates"]
        jobs = {id(d): self._jobs("hashes", d) for d in held}
        self._run("hashing   ", [*checksums, *(job for d in held for job in jobs[id(d)])])
        for role, above in (("proxy", ("validation",)), ("candidates", ("validation", "proxy"))):
            parts = [np.load(job.output + ".npy") for d in held if d.role in above for job in jobs[id(d)]]
            merged = np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)
            with atomic_file(self._forbidden(role)) as stream:  # type: ignore[arg-type]
                np.save(stream, merged)

    def read_benchmarks(self) -> dict[str, Any]:
        """The n-grams that candidates and proxies must not have; what was read, for the manifest."""
        if not self.config.decontamination.files:
            return {}
        marker = self.root / "benchmarks.json"
        if not marker.exists():
            write_json(marker, decontaminate.build(self.config.decontamination, self.root / "benchmarks.npz"))
        return json.loads(marker.read_text(encoding="utf-8"))

    def _checksum_job(self, source: str) -> Job:
        size = Path(source).stat().st_size
        output = str(self.root / "sources" / f"{self._source_index[source]:06d}")
        return Job(kind="sha256", output=output, shard=Shard(source=source, start=0, stop=size, bytes=size))

    def make_tokenizer(self, source: Tokenizer | None, log: Callable[[str], None]) -> dict[str, Any]:
        marker = self.root / "tokenizer.json"
        directory = self.config.output / manifests.TOKENIZER_DIRECTORY
        if marker.exists():
            description = json.loads(marker.read_text(encoding="utf-8"))
            reopen_tokenizer(directory, description)
            return description
        if source is None:
            log(f"training SentencePiece, {self.config.vocab_size} pieces")
            source = train_sentencepiece(self._sample(), self.config.vocab_size)
        description = source.save(directory)
        write_json(marker, description)
        return description

    def _sample(self) -> Iterator[str]:
        """Candidate text for the tokenizer: the beginning of every shard, in proportion to the sources' sizes."""
        runner = JobRunner()
        jobs = [self._gated(job, d) for d in self.datasets if d.role == "candidates" for job in self._jobs("tokens", d)]
        share = min(1.0, self.config.tokenizer_bytes / max(1, sum(job.shard.bytes for job in jobs)))
        for job in jobs:
            left, gate = job.shard.bytes * share, runner.gate(job)
            for record in read_shard(job.shard, job.options):
                if left <= 0:
                    break
                left -= record.bytes
                if record.text is None:
                    if job.on_error == "stop":
                        raise record_error(job.shard, record)
                    continue
                if gate.admit(record) is not None:
                    yield record.text

    def _gated(self, job: Job, dataset: DatasetSpec) -> Job:
        """The job with what its role must not have."""
        if dataset.role == "validation":
            return job
        benchmarks = str(self.root / "benchmarks.npz") if self.config.decontamination.files else None
        return replace(job, forbidden=str(self._forbidden(dataset.role)), benchmarks=benchmarks)

    def tokenize(self, description: dict[str, Any], storage: Storage, log: Callable[[str], None]) -> list[DatasetEntry]:
        dtype = storage.token_dtype(int(description["vocab_size"]))
        directory = str(self.config.output / manifests.TOKENIZER_DIRECTORY)
        jobs = [
            [
                replace(self._gated(job, d), tokenizer=(directory, description), dtype=dtype.name)
                for job in self._jobs("tokens", d)
            ]
            for d in self.datasets
        ]
        self._run(
            "tokenizing", [job for d, own in zip(self.datasets, jobs, strict=True) if not d.limited for job in own]
        )
        entries, chosen = [], []
        for dataset, own in zip(self.datasets, jobs, strict=True):
            chosen.append(self._choose(dataset, own, log))
            entries.append(self._join(dataset, chosen[-1], dtype, storage))
        if self.config.decontamination.files:
            self._list_contaminated(chosen)
        for entry in entries:
            _tell_skipped(entry, log)
            _tell_lost(entry, log)
        if self._written and self._seconds > 0:
            rate, cores = self._written / self._seconds, max(1, self.config.workers)
            log(
                f"tokenized {self._written:,} tokens in {self._seconds:.1f} s with {cores} workers: "
                f"{rate:,.0f} tokens/s, {rate / cores:,.0f} per worker"
            )
        return entries

    def _choose(self, dataset: DatasetSpec, jobs: Sequence[Job], log: Callable[[str], None]) -> Chosen:
        """The documents of a dataset; of a limited one no more pieces are tokenized than it needs."""
        done = 0 if dataset.limited else len(jobs)
        chosen = self._chooser.choose(dataset, jobs[:done])
        while not chosen.full and done < len(jobs):
            more = min(len(jobs), done + _pieces(chosen, dataset, done, max(1, self.config.workers)))
            self._run("tokenizing", jobs[done:more])
            done = more
            chosen = self._chooser.choose(dataset, jobs[:done])
        self._chooser.settle(dataset, chosen)
        cut = [s for s in dataset.sources if s in self.fetched and not self.fetched[s].exhausted]
        if dataset.limited and not chosen.full and cut:
            log(
                f"{dataset.name} ({dataset.role}): {chosen.documents} documents and {chosen.tokens} tokens, less than "
                f"the limit, are left of what was fetched of {', '.join(cut)}; ask for more and cut less"
            )
        return chosen

    def _join(self, dataset: DatasetSpec, chosen: Chosen, dtype: np.dtype, storage: Storage) -> DatasetEntry:
        marker = self.root / f"joined-{dataset.role}-{dataset.name}.json"
        if marker.exists():
            return DatasetEntry(**json.loads(marker.read_text(encoding="utf-8")))
        found = [result for job in chosen.jobs if (result := job.result()) is not None]
        reasons = ("held_out", "empty", "skipped", "contaminated")
        counts = {**{k: sum(r[k] for r in found) for k in reasons}, "duplicates": chosen.duplicates}
        if chosen.documents == 0:
            raise PrepareError(
                f"dataset {dataset.name} ({dataset.role}): no document is left ({counts['held_out']} held out, "
                f"{counts['empty']} empty, {counts['skipped']} skipped, {counts['contaminated']} contaminated, "
                f"{counts['duplicates']} duplicates, none of the others in its split, bucket and limits); give more "
                "documents, another --holdout or, for .txt files, --txt-documents paragraph or line"
            )
        prefix = f"{dataset.role}/{dataset.name}"
        score_key = reads(self.config, dataset).score_key
        entry = DatasetEntry(
            name=dataset.name,
            role=dataset.role,
            prefix=prefix,
            dtype=dtype.name,
            **write_dataset(self.config.output / prefix, dtype, chosen, storage, score_key),
            sources=[self._describe_source(source) for source in dataset.sources],
            **counts,
            **_probe(found),
            skipped_records=[r for f in found for r in f["skipped_records"]][:MAX_LISTED],
        )
        write_json(marker, manifests.entry_dict(entry))
        return entry

    def _list_contaminated(self, chosen: Sequence[Chosen]) -> None:
        with atomic_file(self.config.output / manifests.CONTAMINATED_FILE) as out:
            for dataset, own in zip(self.datasets, chosen, strict=True):
                for job in own.jobs:
                    listed = Path(job.output + ".removed.jsonl")
                    for line in listed.read_text(encoding="ascii").splitlines() if listed.exists() else ():
                        entry = {"role": dataset.role, "domain": dataset.name, **json.loads(line)}
                        out.write((json.dumps(entry) + "\n").encode("ascii"))

    def _describe_source(self, source: str) -> dict[str, Any]:
        if source in self.fetched:
            return self.fetched[source].identity
        if source.startswith(DATASETS_PREFIX):
            return source_identity(source)
        job = self._checksum_job(source)
        result = job.result()
        if result is None:
            raise PrepareError(f"{source}: its checksum is missing; remove {self.root} and prepare again")
        return {"path": recorded(self.config.output, source), "bytes": job.shard.bytes, "sha256": result["sha256"]}


def _pieces(chosen: Chosen, dataset: DatasetSpec, done: int, workers: int) -> int:
    """How many more pieces to tokenize for a limited dataset: as many as it lacks by what the others gave."""
    parts = [(chosen.documents, dataset.max_documents), (chosen.tokens, dataset.max_tokens)]
    share = max(found / limit for found, limit in parts if limit is not None)
    return 2 * workers + (math.ceil(done * (1 / share - 1)) if share > 0 else 0)


def _wanted(config: PrepareConfig, dataset: DatasetSpec) -> hub_streams.Wanted:
    def accepts(record: SourceRecord, split: int) -> bool:
        return kept(split, dataset.keep) and in_bucket(record.bucket, dataset.bucket)

    options = reads(config, dataset)
    return hub_streams.Wanted(
        options=options, accepts=accepts, max_documents=dataset.max_documents, max_tokens=dataset.max_tokens
    )


def _tell_skipped(entry: DatasetEntry, log: Callable[[str], None]) -> None:
    if not entry.skipped:
        return
    shown = entry.skipped_records[:20]
    log(f"{entry.name} ({entry.role}): {entry.skipped} malformed records skipped")
    for record in shown:
        log(f"  {record['file']}:{record['line']}: {record['problem']}")
    if entry.skipped > len(shown):
        log(f"  and {entry.skipped - len(shown)} more, see {manifests.FILE_NAME}")


def _probe(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many characters of a dataset were turned to tokens and back, and which of them were lost."""
    lost: Counter[str] = Counter()
    for result in found:
        lost.update(result.get("lost_characters", {}))  # absent where an earlier release tokenized the piece
    return {
        "probed_characters": sum(result.get("probed_characters", 0) for result in found),
        "lost_characters": sum(lost.values()),
        "most_lost": dict(lost.most_common(20)),
    }


def _tell_lost(entry: DatasetEntry, log: Callable[[str], None]) -> None:
    if not entry.lost_characters:
        return
    most = ", ".join(f"{character!r} {n}" for character, n in list(entry.most_lost.items())[:5])
    log(
        f"WARNING: {entry.name} ({entry.role}): the tokenizer loses {entry.lost_characters:,} of the "
        f"{entry.probed_characters:,} characters that were tried ({entry.lost_characters / entry.probed_characters:.2%}"
        f"), most often {most}: the model will never see them; a tokenizer with bytes as a fallback loses nothing"
    )
