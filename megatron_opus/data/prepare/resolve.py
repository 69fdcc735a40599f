"""What to prepare: datasets and settings, checked and resolved to files and shards before any work is done."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_opus.data import manifest as manifests
from megatron_opus.data.manifest import ROLES, Manifest, Role
from megatron_opus.data.prepare.decontaminate import Decontamination
from megatron_opus.data.prepare.directories import data_files
from megatron_opus.data.prepare.document import template_keys
from megatron_opus.data.prepare.hub_streams import HUB_PREFIX, Fetched
from megatron_opus.data.prepare.records import (
    DATASETS_PREFIX,
    SUFFIXES,
    ReadOptions,
    Shard,
    file_sha256,
    known_suffix,
    plan_shards,
    source_identity,
)
from megatron_opus.data.tokenizers.base import Tokenizer
from megatron_opus.errors import Refusal
from megatron_opus.files import write_json

TRAIN_SENTENCEPIECE = "train-sentencepiece"
WORK_DIRECTORY = ".work"


class PrepareError(Refusal, ValueError):
    """Settings or sources that cannot be prepared: says what was expected, what was found and what to change."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The documents of one domain in one role. sources: files, directories, globs, `datasets:NAME[@CONFIG][:SPLIT]`, or
    `hub:NAME[@CONFIG][:SPLIT][#REVISION]`, which is streamed.

    keep: only the documents whose text hash falls into this part of [0, 1); see `holdout`. bucket: only those whose
    number (see ReadOptions) lies in this closed range. read: None means the preparation's. max_documents, max_tokens:
    the dataset ends before the first document that would exceed one of them.
    """

    name: str
    role: Role
    sources: tuple[str, ...]
    keep: tuple[float, float] = (0.0, 1.0)
    bucket: tuple[float, float] | None = None
    read: ReadOptions | None = None
    max_documents: int | None = None
    max_tokens: int | None = None

    @property
    def limited(self) -> bool:
        return self.max_documents is not None or self.max_tokens is not None


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    output: Path
    tokenizer: str  # gpt2:DIR | sentencepiece:FILE | hf:tokenizer.json | train-sentencepiece
    datasets: tuple[DatasetSpec, ...]
    vocab_size: int = 8192  # of train-sentencepiece
    tokenizer_bytes: int = 32 << 20  # text that train-sentencepiece reads, spread over the candidates
    eod: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    on_error: Literal["stop", "skip"] = "stop"
    duplicates: Literal["drop", "keep"] = "drop"  # of an earlier document of the same role
    decontamination: Decontamination = field(default_factory=Decontamination)  # of candidates and proxies
    workers: int = 1
    shard_bytes: int = 16 << 20
    progress: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)


def holdout(name: str, sources: tuple[str, ...], share: float) -> tuple[DatasetSpec, DatasetSpec]:
    """(validation, proxy) of one target: each document goes to one of them by a hash of its text."""
    if not 0 < share < 1:
        raise PrepareError(f"holdout: expected a share between 0 and 1, got {share}")
    return (
        DatasetSpec(name=name, role="validation", sources=sources, keep=(0.0, share)),
        DatasetSpec(name=name, role="proxy", sources=sources, keep=(share, 1.0)),
    )


def reads(config: PrepareConfig, dataset: DatasetSpec) -> ReadOptions:
    """How the documents of a dataset are read."""
    return config.read if dataset.read is None else dataset.read


def resolve(config: PrepareConfig, log: Callable[[str], None]) -> list[DatasetSpec]:
    """Expand the patterns of the datasets to files, in a fixed order, and say what is left out. Raises PrepareError."""
    if config.on_error not in ("stop", "skip"):
        raise PrepareError(f"on_error: expected stop or skip, got {config.on_error!r}")
    if not any(d.role == "candidates" for d in config.datasets):
        raise PrepareError("expected at least one dataset of candidates (--candidates NAME=FILES)")
    seen = set()
    resolved = []
    for dataset in config.datasets:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", dataset.name):
            raise PrepareError(
                f"dataset name {dataset.name!r}: expected letters, digits, . _ - (none of . - in front; at most 200)"
            )
        if dataset.role not in ROLES:
            raise PrepareError(f"dataset {dataset.name}: expected a role of {', '.join(ROLES)}, got {dataset.role!r}")
        if (dataset.role, dataset.name) in seen:
            raise PrepareError(f"dataset {dataset.name}: given twice as {dataset.role}; list its files together")
        seen.add((dataset.role, dataset.name))
        for limit in (dataset.max_documents, dataset.max_tokens):
            if limit is not None and limit < 1:
                raise PrepareError(
                    f"dataset {dataset.name} ({dataset.role}): expected a limit of at least 1, got {limit}"
                )
        read = reads(config, dataset)
        if not read.text_key:
            raise PrepareError(f"dataset {dataset.name}: expected a key or column of the text, got ''; see --text-key")
        template_keys(read.metadata_template)  # raises for one that cannot be filled in
        if dataset.bucket is not None and not (read.bucket_key or read.score_key):
            raise PrepareError(f"dataset {dataset.name} ({dataset.role}): a bucket needs a score; see --score-key")
        files = [file for pattern in dataset.sources for file in _expand(dataset, pattern, log)]
        twice = sorted({f for f in files if files.count(f) > 1})
        if twice:
            raise PrepareError(f"dataset {dataset.name} ({dataset.role}): {', '.join(twice)} is given twice")
        resolved.append(replace(dataset, sources=tuple(files)))
    return resolved


def _expand(dataset: DatasetSpec, pattern: str, log: Callable[[str], None]) -> list[str]:
    if pattern.startswith((DATASETS_PREFIX, HUB_PREFIX)):
        return [pattern]
    path = Path(pattern)
    if path.is_dir():
        files, aside = data_files(path, SUFFIXES)
        if aside:
            shown = ", ".join(aside[:5]) + (f" and {len(aside) - 5} more" if len(aside) > 5 else "")
            log(f"{dataset.name} ({dataset.role}): left out of {pattern}: {shown}; name them with a glob to have them")
        what = f"no {', '.join(SUFFIXES)} file in this directory"
        kinds = sorted({known_suffix(f) for f in files})
        if len(kinds) > 1:
            # A licence or a readme beside the data must not become a training document.
            raise PrepareError(
                f"dataset {dataset.name} ({dataset.role}): {pattern} holds {', '.join(kinds)} files; say which ones "
                f"with a glob, for example '{pattern.rstrip('/')}/**/*{kinds[0]}'"
            )
    elif path.is_file():
        return [pattern]
    else:
        files = sorted(f for f in glob.glob(pattern, recursive=True) if Path(f).is_file())
        what = "no such file"
    if not files:
        raise PrepareError(f"dataset {dataset.name} ({dataset.role}): {pattern}: {what}")
    return files


def expand_files(option: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Files of names and globs, in order. Raises PrepareError for a pattern without any."""
    found: list[str] = []
    for pattern in patterns:
        files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not files:
            raise PrepareError(f"{option} {pattern}: no such file")
        found += [file for file in files if file not in found and Path(file).is_file()]
    return tuple(found)


def describe_settings(
    config: PrepareConfig, datasets: Sequence[DatasetSpec], source: Tokenizer | None
) -> dict[str, Any]:
    """Everything that the tokens depend on, apart from the content of the sources."""
    trained = {"vocab_size": config.vocab_size, "tokenizer_bytes": config.tokenizer_bytes} if source is None else {}
    benchmarks = asdict(config.decontamination)
    benchmarks["files"] = [{"path": file, "sha256": _benchmark_sha256(file)} for file in config.decontamination.files]
    return {
        "tokenizer": TRAIN_SENTENCEPIECE if source is None else f"{source.kind} {source.fingerprint}",
        **trained,
        **_read_settings(config.read),
        "on_error": config.on_error,
        **({"duplicates": config.duplicates} if config.duplicates != "keep" else {}),
        **({"decontamination": benchmarks} if config.decontamination.files else {}),
        "datasets": {f"{d.role}/{d.name}": _dataset_settings(config, d) for d in datasets},
    }


def _read_settings(read: ReadOptions) -> dict[str, Any]:
    # What is not used is left out: directories made before it existed stay finished.
    always = ("text_key", "txt_documents")
    return {key: value for key, value in asdict(read).items() if key in always or value}


def _dataset_settings(config: PrepareConfig, dataset: DatasetSpec) -> dict[str, Any]:
    more = {"bucket": dataset.bucket, "max_documents": dataset.max_documents, "max_tokens": dataset.max_tokens}
    return {
        "sources": [recorded(config.output, s) for s in dataset.sources],
        "keep": list(dataset.keep),
        **({} if dataset.read in (None, config.read) else {"read": _read_settings(reads(config, dataset))}),
        **{key: value for key, value in more.items() if value is not None},
    }


def _benchmark_sha256(file: str) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise PrepareError(
            f"{file}: the benchmark file cannot be read: {error.strerror}; see --decontaminate"
        ) from error


def recorded(output: Path, source: str) -> str:
    """How the manifest names a source: relative to itself where it lies below, so that the directory can be moved."""
    path = Path(source)
    inside = not source.startswith((DATASETS_PREFIX, HUB_PREFIX)) and path.resolve().is_relative_to(output.resolve())
    return f"./{path.resolve().relative_to(output.resolve())}" if inside else source


def plan_work(
    config: PrepareConfig,
    settings: dict[str, Any],
    datasets: Sequence[DatasetSpec],
    fetch: Callable[[str, int], Fetched],
) -> tuple[dict[str, list[Shard]], dict[str, Fetched]]:
    """Shards of every source, and what was fetched of those that are streamed; compared with the work directory.

    fetch(source, number) brings a streamed source into the work directory, or takes up an interrupted fetching.
    """
    shards: dict[str, list[Shard]] = {}
    streamed: list[str] = []
    for dataset in datasets:
        for source in dataset.sources:
            if source.startswith(HUB_PREFIX):
                streamed += [source] if source not in streamed else []
            else:  # again for another dataset: its columns may be others
                shards[source] = plan_shards(source, config.shard_bytes, reads(config, dataset))
    work = config.output / WORK_DIRECTORY
    _agree(work / "settings.json", {"settings": settings}, config.output)
    fetched = {source: fetch(source, number) for number, source in enumerate(streamed)}
    for source, found in fetched.items():
        shards[source] = list(found.shards)
    identities = [fetched[source].identity if source in fetched else source_identity(source) for source in shards]
    plan = {
        "settings": settings,
        "sources": identities,
        "shards": {source: [s.to_json() for s in parts] for source, parts in shards.items()},
    }
    _agree(work / "plan.json", plan, config.output)
    return shards, fetched


def _agree(path: Path, plan: dict[str, Any], output: Path) -> None:
    """Keep a plan, or compare it with the one that is kept."""
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        _refuse_difference(output, old, plan, "holds an unfinished preparation")
    else:
        path.parent.mkdir(exist_ok=True)
        write_json(path, plan)


def check_finished(output: Path, settings: dict[str, Any]) -> Manifest:
    """The manifest of a complete directory that was made with these settings from these files; else PrepareError."""
    done = manifests.read(output)
    _refuse_difference(output, {"settings": done.settings}, {"settings": settings}, "is already prepared")
    written = (output / manifests.FILE_NAME).stat().st_mtime_ns
    for entry in done.datasets:
        for source in entry.sources:
            if "sha256" not in source:
                continue
            path = output / source["path"] if source["path"].startswith("./") else Path(source["path"])
            stat = path.stat()
            same = stat.st_size == source["bytes"]
            # Newer than the manifest: copied or touched perhaps, so that only the content can tell.
            if same and stat.st_mtime_ns > written:
                same = file_sha256(path) == source["sha256"]
            if not same:
                raise PrepareError(
                    f"{output} is already prepared, but {path} has changed since; choose another --output or remove "
                    "the directory"
                )
    for entry in done.datasets:
        found = (output / f"{entry.prefix}.bin").stat().st_size if (output / f"{entry.prefix}.bin").exists() else 0
        if found != entry.bin_bytes:
            raise PrepareError(
                f"{output}/{entry.prefix}.bin: expected {entry.bin_bytes} bytes by the manifest, found {found}; "
                "remove the directory and prepare it again"
            )
    return done


def _refuse_difference(output: Path, old: dict[str, Any], new: dict[str, Any], state: str) -> None:
    # Through JSON, so that tuples and lists compare equal.
    before, after = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    if before == after:
        return
    for part in ("settings", "sources", "shards"):
        if before.get(part) == after.get(part):
            continue
        a, b = before[part], after[part]
        if part == "settings":
            changed = next(k for k in {**a, **b} if a.get(k) != b.get(k))
            then, now = a.get(changed), b.get(changed)
            if isinstance(then, dict) and isinstance(now, dict):
                inner = next(k for k in {**then, **now} if then.get(k) != now.get(k))
                changed, then, now = f"{changed} {inner}", then.get(inner, "absent"), now.get(inner, "absent")
            detail = f"{changed}: then {then}, now {now}"
        elif part == "sources":
            changed_sources = [y["path"] for y in b if y not in a] or [x["path"] for x in a if x not in b]
            detail = f"{', '.join(changed_sources)} has changed since"
        else:
            detail = "the shard size differs"
        raise PrepareError(
            f"{output} {state} with other settings ({detail}); use the same ones, choose another --output or remove "
            "the directory"
        )
