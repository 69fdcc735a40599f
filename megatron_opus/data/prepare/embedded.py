"""The embedded corpus: something real to pre-train on without a download, made from the standard library.

The target is the reference prose: proxy and held-out validation come from it. Candidates come from all domains, prose
among them but a small part of the whole, so that a selection has something to find. The other domains give a small
validation set each, so that a run can report what its choice costs there.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opus.data import manifest as manifests
from megatron_opus.data.manifest import Manifest, Role
from megatron_opus.data.prepare import stdlib_text
from megatron_opus.data.prepare.pipeline import Storage, prepare
from megatron_opus.data.prepare.records import text_digest
from megatron_opus.data.prepare.resolve import TRAIN_SENTENCEPIECE, DatasetSpec, PrepareConfig
from megatron_opus.data.prepare.tokenize import kept
from megatron_opus.files import atomic_file, locked

VERSION = 1  # of the recipe below: another one gives another directory
TARGET = "prose"
VOCAB_SIZE = 4096
_TOKENIZER_BYTES = 4 << 20
_MIN_SHARD_BYTES = 1 << 20

# domain -> role -> part of the documents, by a hash of their text
SPLITS: dict[str, dict[Role, tuple[float, float]]] = {
    "prose": {"validation": (0.0, 0.15), "proxy": (0.15, 0.4), "candidates": (0.4, 1.0)},
    "docstrings": {"validation": (0.0, 0.05), "candidates": (0.05, 1.0)},
    "source": {"validation": (0.0, 0.02), "candidates": (0.02, 1.0)},
    "tables": {"validation": (0.0, 0.04), "candidates": (0.04, 1.0)},
}


def embedded_directory(cache_dir: str | Path) -> Path:
    """Where the embedded corpus of this Python lives below `cache_dir`.

    The library's text differs between versions of Python, so each has its own directory: what a run reads depends on
    the interpreter that runs it and never on which one happened to come first.
    """
    python = f"{platform.python_implementation().lower()}-{platform.python_version()}"
    return Path(cache_dir) / "embedded" / f"v{VERSION}-{python}"


def prepare_embedded(
    cache_dir: str | Path,
    storage: Storage,
    *,
    workers: int | None = None,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
) -> Path:
    """The prepared directory, made at the first call (seconds); any number of processes may call it at once.

    One of them does the work under a lock while the others wait; the directory appears complete or not at all.
    Raises StandardLibraryError where this Python has not the text.
    """
    provenance = {
        "corpus": "Python standard library",
        "recipe": VERSION,
        "python": platform.python_version(),
        "target": TARGET,
    }
    return prepare_once(
        embedded_directory(cache_dir), _write_text, provenance, storage, workers=workers, progress=progress, log=log
    )


def prepare_once(
    directory: Path,
    write_text: Callable[[Path], tuple[DatasetSpec, ...]],
    provenance: dict[str, Any],
    storage: Storage,
    *,
    workers: int | None = None,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
) -> Path:
    """`directory` with what `write_text` puts into a folder of its own, prepared with a tokenizer trained on it.

    Complete or not at all; any number of processes may call it at once, and all but the first only look.
    """
    if (directory / manifests.FILE_NAME).exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.with_name(directory.name + ".lock")) as held:
        if not (directory / manifests.FILE_NAME).exists():
            say = log or (lambda _: None)
            _build(
                directory, write_text, provenance, storage, held, workers or min(2, os.cpu_count() or 1), progress, say
            )
    return directory


def _build(
    directory: Path,
    write_text: Callable[[Path], tuple[DatasetSpec, ...]],
    provenance: dict[str, Any],
    storage: Storage,
    held: bool,
    workers: int,
    progress: bool,
    log: Callable[[str], None],
) -> Manifest:
    # Where locks do not reach (other nodes, some file systems), processes do the same work in directories of their own,
    # and the first to finish gives the name. What an interrupted build left is not worth resuming.
    mine = f"{directory.name}.{platform.node()}."
    building = directory.with_name(f"{mine}{os.getpid()}.partial")
    for stale in directory.parent.glob(f"{mine}*.partial"):
        if held or stale == building:
            shutil.rmtree(stale, ignore_errors=True)
    (building / "text").mkdir(parents=True)
    specs = write_text(building / "text")
    made = prepare(
        PrepareConfig(
            output=building,
            tokenizer=TRAIN_SENTENCEPIECE,
            vocab_size=VOCAB_SIZE,
            tokenizer_bytes=_TOKENIZER_BYTES,
            datasets=specs,
            workers=workers,
            shard_bytes=_MIN_SHARD_BYTES,
            duplicates="keep",  # the recipe decides what is in it, near-duplicates that coincide among them
            progress=progress,
            provenance=provenance,
        ),
        storage,
        log,
    )
    try:
        os.rename(building, directory)
    except OSError:
        if not (directory / manifests.FILE_NAME).exists():
            raise
        shutil.rmtree(building)
    return made


def _write_text(directory: Path) -> tuple[DatasetSpec, ...]:
    parts = {
        (domain, role): [text for text in texts if kept(text_digest(text)[1], part)]
        for domain, texts in stdlib_text.documents().items()
        for role, part in SPLITS[domain].items()
    }
    return write_parts(directory, parts)


def write_parts(
    directory: Path, parts: Mapping[tuple[str, Role], Sequence[str]], sources: Mapping[str, str] | None = None
) -> tuple[DatasetSpec, ...]:
    """One .jsonl per domain and role; documents in the order of their hashes, so that every part is a mixture.

    sources: text -> where it comes from, written beside the text; nothing that trains reads it.
    """
    specs = []
    for (domain, role), texts in parts.items():
        path = directory / f"{role}-{domain}.jsonl"
        with atomic_file(path) as stream:
            for _, text in sorted((text_digest(text)[1], text) for text in texts):
                source = {"source": sources[text]} if sources and text in sources else {}
                stream.write((json.dumps({"text": text, **source}) + "\n").encode())
        specs.append(DatasetSpec(name=domain, role=role, sources=(str(path),)))
    return tuple(specs)
