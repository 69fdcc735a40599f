"""What to prepare: datasets and settings, checked and resolved to files and shards before any work is done."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_opus.data import manifest as manifests
from megatron_opus.data import tokenizers
from megatron_opus.data.files import write_json
from megatron_opus.data.manifest import ROLES, Manifest, Role
from megatron_opus.data.records import (
    DATASETS_PREFIX,
    SUFFIXES,
    ReadOptions,
    Shard,
    file_sha256,
    plan_shards,
    source_identity,
)

TRAIN_SENTENCEPIECE = "train-sentencepiece"
WORK_DIRECTORY = ".work"


class PrepareError(ValueError):
    """Settings or sources that cannot be prepared: says what was expected, what was found and what to change."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The documents of one domain in one role. sources: files, directories, globs or `datasets:NAME[@CONFIG][:SPLIT]`.

    keep: only the documents whose text hash falls into this part of [0, 1); see `holdout`.
    """

    name: str
    role: Role
    sources: tuple[str, ...]
    keep: tuple[float, float] = (0.0, 1.0)


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


def resolve(config: PrepareConfig) -> list[DatasetSpec]:
    """The datasets with their patterns expanded to files, in a fixed order. Raises PrepareError."""
    if config.on_error not in ("stop", "skip"):
        raise PrepareError(f"on_error: expected stop or skip, got {config.on_error!r}")
    if not any(d.role == "candidates" for d in config.datasets):
        raise PrepareError("expected at least one dataset of candidates (--candidates NAME=FILES)")
    seen = set()
    resolved = []
    for dataset in config.datasets:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", dataset.name):
            raise PrepareError(f"dataset name {dataset.name!r}: expected letters, digits, . _ - only")
        if dataset.role not in ROLES:
            raise PrepareError(f"dataset {dataset.name}: expected a role of {', '.join(ROLES)}, got {dataset.role!r}")
        if (dataset.role, dataset.name) in seen:
            raise PrepareError(f"dataset {dataset.name}: given twice as {dataset.role}; list its files together")
        seen.add((dataset.role, dataset.name))
        files = [file for pattern in dataset.sources for file in _expand(dataset, pattern)]
        twice = sorted({f for f in files if files.count(f) > 1})
        if twice:
            raise PrepareError(f"dataset {dataset.name} ({dataset.role}): {', '.join(twice)} is given twice")
        resolved.append(replace(dataset, sources=tuple(files)))
    return resolved


def _expand(dataset: DatasetSpec, pattern: str) -> list[str]:
    if pattern.startswith(DATASETS_PREFIX):
        return [pattern]
    path = Path(pattern)
    if path.is_dir():
        files = sorted(str(f) for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        what = f"no {', '.join(SUFFIXES)} file in this directory"
        kinds = sorted({Path(f).suffix for f in files})
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


def describe_settings(
    config: PrepareConfig, datasets: Sequence[DatasetSpec], source: tokenizers.Tokenizer | None
) -> dict[str, Any]:
    """Everything that the tokens depend on, apart from the content of the sources."""
    trained = {"vocab_size": config.vocab_size, "tokenizer_bytes": config.tokenizer_bytes} if source is None else {}
    return {
        "tokenizer": TRAIN_SENTENCEPIECE if source is None else f"{source.kind} {source.fingerprint}",
        **trained,
        "text_key": config.read.text_key,
        "txt_documents": config.read.txt_documents,
        "on_error": config.on_error,
        "datasets": {
            f"{d.role}/{d.name}": {"sources": [recorded(config.output, s) for s in d.sources], "keep": list(d.keep)}
            for d in datasets
        },
    }


def recorded(output: Path, source: str) -> str:
    """How the manifest names a source: relative to itself where it lies below, so that the directory can be moved."""
    path = Path(source)
    inside = not source.startswith(DATASETS_PREFIX) and path.resolve().is_relative_to(output.resolve())
    return f"./{path.resolve().relative_to(output.resolve())}" if inside else source


def plan_work(
    config: PrepareConfig, settings: dict[str, Any], datasets: Sequence[DatasetSpec]
) -> dict[str, list[Shard]]:
    """Shards of every source; kept in the work directory, and compared with it when resuming."""
    sources = list(dict.fromkeys(s for d in datasets for s in d.sources))
    shards = {source: plan_shards(source, config.shard_bytes, config.read) for source in sources}
    plan = {
        "settings": settings,
        "sources": [source_identity(source) for source in sources],
        "shards": {source: [s.to_json() for s in parts] for source, parts in shards.items()},
    }
    path = config.output / WORK_DIRECTORY / "plan.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        _refuse_difference(config.output, old, plan, "holds an unfinished preparation")
    else:
        path.parent.mkdir(exist_ok=True)
        write_json(path, plan)
    return shards


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
