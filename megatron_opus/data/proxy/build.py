"""A proxy data set out of the candidates: the documents most like the benchmarks, or a random held-out split.

BENCH-PROXY (OPUS, arXiv 2602.05400, Sec. 6.2): documents in descending order of their largest cosine similarity to a
benchmark sample until a token budget is reached. `std` (Tab. 7) takes them in the order of a hash instead.

The output is a prepared directory: its candidates and validation sets are those of the corpus, read from the corpus'
own files, less every document that has the text of a proxy document; its proxy is a stream of its own. The proxy that
the corpus was prepared with is not taken over: it stays held out, and out of use.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megatron_opus.data import manifest as manifests
from megatron_opus.data import unlearned_spans
from megatron_opus.data.benchmarks.items import load_benchmarks
from megatron_opus.data.excluded_documents import WithoutDocuments, open_entry, write_spans
from megatron_opus.data.manifest import DatasetEntry, Manifest
from megatron_opus.data.prepare.assemble import Storage
from megatron_opus.data.proxy import report as proxy_report
from megatron_opus.data.proxy.choice import ProxyChoice, Survey, choose, survey
from megatron_opus.data.proxy.encoders import Encoder
from megatron_opus.data.proxy.similarity import CandidateDocuments, ProxyError, Scorer, Scoring, refuse_difference
from megatron_opus.data.token_files import sampled_sha256
from megatron_opus.files import PARTIAL, atomic_file, locked
from megatron_opus.types import TokenDocuments

Kind = Literal["bench", "std"]
SETTINGS_KEY = "build_proxy"
_TOKENS = "proxy.tokens"
_OURS = ("excluded", "proxy", "scores", "tokenizer", "report.txt", "report.png", "with_benchmark_text.jsonl")
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


class ReadableStorage(Storage, Protocol):
    def open_documents(self, name: str, prefix: str | Path) -> TokenDocuments: ...


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """benchmarks: (name, file) pairs; a `std` proxy needs none, and keeps their text out if it has some.

    encoder: None for `std`. scores: where similarities are kept, `output/scores` by default; another output with
    another budget can use them again.
    part: (i, n): score the i-th of n parts only, and build nothing.
    """

    corpus: Path
    output: Path
    kind: Kind = "bench"
    benchmarks: tuple[tuple[str, str], ...] = ()
    encoder: Encoder | None = None
    token_budget: int = 30_000_000
    windows: Literal["first", "all"] = "first"
    scores: Path | None = None
    seed: int = 42
    part: tuple[int, int] = (0, 1)
    progress: bool = True


def parse_tokens(text: str) -> int:
    """30000000 of `30M`, `30000k`, `0.03B` or `30000000`. Raises ProxyError."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in _UNITS else (text, "")
    try:
        value = float(number) * _UNITS.get(unit, 1)
        if value < 1 or value != int(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise ProxyError(
            f"token budget: expected a positive number such as 30M, 1.5B or 30000000, got {text!r}"
        ) from None
    return int(value)


def build(config: ProxyConfig, storage: ReadableStorage, log: Callable[[str], None]) -> Manifest | None:
    """Make `config.output`, or go on with what an interrupted run left; returns its manifest (None for a part).

    Raises ProxyError for settings that cannot work, BenchmarkError, EncoderError, and what reading the corpus raises. A
    directory that was built with the same settings is left as it is.
    """
    items = load_benchmarks(config.benchmarks) if config.benchmarks or config.kind == "bench" else []
    _check(config)
    documents = CandidateDocuments(config.corpus, storage.open_documents)
    scoring = Scoring(
        directory=config.scores or config.output / "scores",
        items=items,
        encoder=config.encoder if config.kind == "bench" else None,
        windows=config.windows,
        seed=config.seed,
        part=config.part,
        progress=config.progress,
    )
    settings = {"kind": config.kind, "token_budget": config.token_budget, **scoring.settings(documents)}
    config.output.mkdir(parents=True, exist_ok=True)
    part, parts = config.part
    busy = f"{config.output}: another run is at work here; wait or stop it"
    with locked(config.output / (".lock" if parts == 1 else f".lock-{part}-of-{parts}"), busy) as held:
        if not held:
            log(f"{config.output}: this file system has no locks; make sure that no other run writes here")
        if (config.output / manifests.FILE_NAME).exists():
            return _finished(config.output, settings, storage, log)
        _check_output(config)
        _check_disk(config, documents)
        scoring.directory.mkdir(parents=True, exist_ok=True)
        if parts == 1:
            for stale in (*config.output.glob(f"*{PARTIAL}"), *scoring.directory.glob(f"*{PARTIAL}")):
                stale.unlink()
        scorer = Scorer(documents, scoring)
        scorer.run()
        if parts > 1:
            left = scorer.unscored()
            log(f"part {part} of {parts} is scored; {f'{left} pieces are left' if left else 'all parts are complete'}")
            return None
        choice = choose(scorer, config.token_budget)
        found = survey(scorer, choice)
        manifest = _write(config, settings, scorer, choice, found, storage)
        for path in proxy_report.write(scorer, choice, found, manifest, config.output):
            log(str(path))
        manifests.write(config.output, manifest)
        return manifest


def _check(config: ProxyConfig) -> None:
    if config.token_budget < 1:
        raise ProxyError(f"token budget: expected a positive number, got {config.token_budget}")
    if config.kind == "bench" and config.encoder is None:
        raise ProxyError("a benchmark proxy needs an encoder; for a random one choose --kind std")
    part, parts = config.part
    if parts < 1 or not 0 <= part < parts:
        raise ProxyError(f"part: expected 0 <= I < N, got {part}/{parts}")
    if config.output.resolve() == config.corpus.resolve():
        raise ProxyError(
            f"{config.output}: the output must be another directory than the corpus, which is left as it is"
        )


def _finished(output: Path, settings: dict[str, Any], storage: ReadableStorage, log: Callable[[str], None]) -> Manifest:
    done = manifests.read(output)
    if SETTINGS_KEY not in done.settings:
        raise ProxyError(f"{output} already holds prepared data of another kind; choose another --output")
    remedy = "use the same ones, choose another --output (--scores can be shared) or remove the directory"
    refuse_difference(str(output), done.settings[SETTINGS_KEY], settings, remedy)
    for entry in done.datasets:
        open_entry(output, entry, storage.open_documents)
    log(f"{output}: already built with these settings")
    return done


def _check_output(config: ProxyConfig) -> None:
    """What an interrupted run left is written over; files of another kind are not."""
    scores = config.scores.resolve() if config.scores else config.output / "scores"
    for path in sorted(config.output.iterdir()):
        known = path.name in _OURS or path.name.startswith(".lock") or path.name.endswith(PARTIAL)
        if not known and not scores.is_relative_to(path.resolve()):
            raise ProxyError(f"{config.output} holds {path.name}, which is not of this tool; choose another --output")


def _check_disk(config: ProxyConfig, documents: CandidateDocuments) -> None:
    count = sum(entry.documents for entry in documents.entries)
    # Records and, while the index is written, the proxy twice; 64 MiB for counts, lists and the report.
    needed = count * 25 + 2 * config.token_budget * np.dtype(documents.entries[0].dtype).itemsize + (64 << 20)
    free = shutil.disk_usage(config.output).free
    if free < needed:
        raise ProxyError(f"{config.output}: about {needed >> 20} MiB of disk are needed, {free >> 20} MiB are free")


# --- writing --------------------------------------------------------------------------------------------------------


def _write(
    config: ProxyConfig,
    settings: dict[str, Any],
    scorer: Scorer,
    choice: ProxyChoice,
    found: Survey,
    storage: ReadableStorage,
) -> Manifest:
    """Everything but the report and the manifest, which says that the directory is complete."""
    documents, output = scorer.documents, config.output
    for old in ("excluded", "proxy"):
        shutil.rmtree(output / old, ignore_errors=True)
    base = os.path.relpath(documents.directory.resolve(), output.resolve())
    entries = []
    for number, entry in enumerate(documents.entries):
        spans = found.spans[number]
        if len(spans) == entry.documents:
            raise ProxyError(
                f"domain {entry.name}: all of its {entry.documents} documents would become proxy and none would be "
                "left to choose from; lower --token-budget, or prepare the domain as a target instead"
            )
        if not len(spans):
            entries.append(replace(entry, base=base))
            continue
        path = output / "excluded" / f"{entry.name}.npy"
        path.parent.mkdir(exist_ok=True)
        entries.append(
            replace(
                entry,
                base=base,
                documents=entry.documents - len(spans),
                tokens=entry.tokens - int((spans[:, 2] - spans[:, 1]).sum()),
                held_out=entry.held_out + len(spans),
                masked_tokens=_masked_tokens(documents, number, spans),
                scores={},  # of the documents by their number, which is another one now
                excluded=path.relative_to(output).as_posix(),
                excluded_sha256=write_spans(path, spans),
            )
        )
    entries.append(_write_proxy(config, scorer, choice, storage))
    entries += [replace(entry, base=base) for entry in documents.manifest.of_role("validation")]
    target = output / manifests.TOKENIZER_DIRECTORY
    description = documents.tokenizer.save(target)
    return Manifest(
        tokenizer=description,
        datasets=entries,
        settings={SETTINGS_KEY: settings},
        provenance={**documents.manifest.provenance, "proxy": proxy_report.summary(scorer, choice, found)},
        decontamination=documents.manifest.decontamination,
    )


def _masked_tokens(documents: CandidateDocuments, domain: int, spans: np.ndarray) -> int:
    """Tokens that are not learned in what is left of a domain."""
    unlearned = documents.unlearned[domain]
    if unlearned is None:
        return 0
    left = WithoutDocuments(documents.streams[domain], spans).ranges(unlearned)
    return int((left[:, 1] - left[:, 0]).sum())


def _write_proxy(config: ProxyConfig, scorer: Scorer, choice: ProxyChoice, storage: ReadableStorage) -> DatasetEntry:
    """The chosen documents, best first, as one stream; `proxy/documents.jsonl` says where each came from."""
    documents = scorer.documents
    dtype = np.dtype(documents.entries[0].dtype)
    name = f"{config.kind}_proxy"
    folder = config.output / "proxy"
    folder.mkdir(exist_ok=True)
    raw = folder / _TOKENS
    unlearned, written_tokens = [np.empty((0, 2), dtype=np.int64)], 0
    with raw.open("wb") as stream:
        for row in choice.chosen:
            document = documents.one(int(row["domain"]), int(row["document"]))
            stream.write(document.ids.astype(dtype).tobytes())
            unlearned.append(documents.unlearned_within(document) + written_tokens)
            written_tokens += len(document.ids)
    written: Any = storage.write_documents(folder / name, dtype, [raw], [choice.chosen["tokens"].astype(np.int32)])
    raw.unlink()
    spans = np.concatenate(unlearned)
    masked: dict[str, Any] = {}
    if len(spans):
        count = int((spans[:, 1] - spans[:, 0]).sum())
        digest = unlearned_spans.write(folder / name, unlearned_spans.SUFFIX, spans)
        masked = {"masked_tokens": count, "mask_spans": len(spans), "mask_sha256": digest}
    with atomic_file(folder / "documents.jsonl") as out:
        for line in proxy_report.listing(scorer, choice.chosen):
            out.write(line)
    sources = [
        {"path": f"{documents.directory / e.prefix}.bin", "bytes": e.bin_bytes, "sha256": e.bin_sha256}
        for e in documents.entries
    ]
    return DatasetEntry(
        name=name,
        role="proxy",
        prefix=f"proxy/{name}",
        dtype=dtype.name,
        documents=written.documents,
        tokens=written.tokens,
        bin_bytes=written.bin_bytes,
        bin_sha256=written.bin_sha256,
        idx_sha256=written.idx_sha256,
        bin_sample_sha256=sampled_sha256(folder / f"{name}.bin"),
        idx_sample_sha256=sampled_sha256(folder / f"{name}.idx"),
        sources=sources,
        **masked,
    )
