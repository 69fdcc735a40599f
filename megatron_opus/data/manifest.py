"""`manifest.json` of a prepared directory: what the token files are, where they came from, how to check them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron_opus.errors import Refusal
from megatron_opus.files import write_json

FORMAT = "megatron_opus.data"
VERSION = 1
FILE_NAME = "manifest.json"
TOKENIZER_DIRECTORY = "tokenizer"
CONTAMINATED_FILE = "decontamination.jsonl"  # documents dropped for a benchmark overlap, one a line

Role = Literal["candidates", "proxy", "validation"]
ROLES: tuple[Role, ...] = ("candidates", "proxy", "validation")


class ManifestError(Refusal, ValueError):
    """A prepared directory whose manifest is missing, unreadable or of another version."""


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One token stream: the documents of one domain in one role."""

    name: str
    role: Role
    prefix: str  # of the .bin / .idx files, relative to the manifest (or that of `base`)
    dtype: str  # of the tokens on disk
    documents: int
    tokens: int  # end-of-document tokens included
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str
    sources: list[dict[str, Any]]  # path, bytes, sha256 (or the fingerprint of a Hugging Face dataset)
    held_out: int = 0  # documents dropped because a higher role (validation > proxy > candidates) has the same text
    empty: int = 0  # documents without text, or whose text gives no token
    skipped: int = 0  # malformed records left out by on_error skip
    skipped_records: list[dict[str, Any]] = field(default_factory=list)  # file, line, problem: the first MAX_LISTED
    base: str = ""  # the prepared directory that has the files, relative to this one; empty: this one; see `views`
    excluded: str = ""  # file, relative to the manifest, of the documents of the base that are left out
    excluded_sha256: str = ""
    duplicates: int = 0  # documents dropped because an earlier one of the same role has the same text
    contaminated: int = 0  # documents dropped because they overlap a benchmark item, listed in CONTAMINATED_FILE
    masked_tokens: int = 0  # of metadata, which are not learned; see masks.py
    mask_spans: int = 0  # in the file
    mask_sha256: str = ""  # of <prefix>.mask.npy; empty: there is none
    probed_characters: int = 0  # of the documents, turned to tokens and back
    lost_characters: int = 0  # of those, not in the text that came back
    most_lost: dict[str, int] = field(default_factory=dict)  # the most frequent of them
    bin_sample_sha256: str = ""  # see token_files.py; empty: prepared before there were samples
    idx_sample_sha256: str = ""
    scores: dict[str, Any] = field(default_factory=dict)  # key, min, mean, max, sha256 of <prefix>.score.npy


def base_directory(directory: Path, entry: DatasetEntry) -> Path:
    """Return the prepared directory that holds the files of an entry of `directory`: its own, or its base."""
    # `..` is meant of the directory itself, not of a link to it.
    return Path(os.path.normpath(directory.resolve() / entry.base)) if entry.base else directory


@dataclass(frozen=True, kw_only=True)
class Manifest:
    tokenizer: dict[str, Any]
    datasets: list[DatasetEntry]
    settings: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)  # free: the embedded corpus records its Python version
    decontamination: dict[str, Any] = field(default_factory=dict)  # rule and benchmark files; empty: none was asked for

    def of_role(self, role: Role) -> list[DatasetEntry]:
        return [entry for entry in self.datasets if entry.role == role]

    def fingerprint(self) -> str:
        """sha256 over roles, names, token files and tokenizer: what the tokens are, wherever they came from."""
        what = [
            [e.role, e.name, e.dtype, e.bin_sha256, e.idx_sha256, *(s for s in (e.mask_sha256, e.excluded_sha256) if s)]
            for e in self.datasets
        ]
        text = json.dumps([VERSION, self.tokenizer["fingerprint"], what])
        return hashlib.sha256(text.encode()).hexdigest()


def entry_dict(entry: DatasetEntry) -> dict[str, Any]:
    """Plain data that `DatasetEntry(**...)` turns back into the entry."""
    return asdict(entry)


def write(directory: Path, manifest: Manifest) -> None:
    """Atomically; the same manifest gives the same bytes."""
    data = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    write_json(directory / FILE_NAME, data)


def read(directory: Path) -> Manifest:
    """Raises ManifestError when there is none in `directory` or it is of another format or version."""
    path = directory / FILE_NAME
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ManifestError(f"{path}: expected a file, found a folder or a pipe; prepare the data again")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(
            f"{path}: not found; expected a directory made by tools/prepare_data.py (data.path=embedded needs none)"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise ManifestError(f"{path}: not a file of valid JSON ({error}); prepare the data again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ManifestError(f"{path}: expected format {FORMAT!r}; this is another kind of file")
    if data.get("version") != VERSION:
        raise ManifestError(
            f"{path}: expected version {VERSION}, found {data.get('version')!r}; prepare the data again"
        )
    try:
        entries = [_checked(DatasetEntry(**entry)) for entry in data["datasets"]]
        for key in ("tokenizer", "settings", "provenance"):
            if not isinstance(data[key], dict):
                raise TypeError(f"{key}: expected keys and values, got {data[key]!r}")
        if not isinstance(data["tokenizer"]["fingerprint"], str):
            raise TypeError(f"tokenizer: fingerprint: expected text, got {data['tokenizer']['fingerprint']!r}")
        return Manifest(
            tokenizer=data["tokenizer"],
            datasets=entries,
            settings=data["settings"],
            provenance=data["provenance"],
            decontamination=data.get("decontamination", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{path}: damaged ({error}); prepare the data again") from error


def _checked(entry: DatasetEntry) -> DatasetEntry:
    """Raise TypeError or ValueError, naming the key, for a value of another kind or a path out of the directory."""
    kinds = {"str": str, "Role": str, "int": int, "dict": dict, "list": list}
    for field_ in fields(entry):
        value, kind = getattr(entry, field_.name), kinds[str(field_.type).partition("[")[0]]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"datasets: {field_.name}: expected {kind.__name__}, got {value!r}")
        if isinstance(value, int) and not 0 <= value < 1 << 63:
            raise ValueError(f"datasets: {field_.name}: expected a count, got {value}")
    if entry.role not in ROLES:
        raise ValueError(f"datasets: role: expected one of {', '.join(ROLES)}, got {entry.role!r}")
    for key in ("prefix", "excluded"):
        path = Path(getattr(entry, key))
        if path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise ValueError(f"datasets: {key}: expected a path below the manifest, got {str(path)!r}")
    return entry
