"""Published corpora by name, and what a command line asks for as datasets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_opus.data.manifest import Role
from megatron_opus.data.prepare.document import ReadOptions, TextDocuments
from megatron_opus.data.prepare.resolve import DatasetSpec, PrepareError, holdout


@dataclass(frozen=True, kw_only=True)
class Preset:
    """source: where the corpus is published; empty: it must be given. domains: name -> bucket of the number."""

    source: str
    domains: Mapping[str, tuple[float, float] | None]
    read: Mapping[str, str]


# Columns as the data set cards have them. FineWeb-Edu's `score` is a classifier's estimate of educational value,
# `int_score` the same rounded to 0..5, of which the data set keeps 3 and more. No public name of SciencePedia's text is
# known here, so its files or repository must be given, with their columns where they are not `text`.
PRESETS: Mapping[str, Preset] = {
    "fineweb": Preset(source="hub:HuggingFaceFW/fineweb@sample-10BT:train", domains={"fineweb": None}, read={}),
    "fineweb-edu": Preset(
        source="hub:HuggingFaceFW/fineweb-edu@sample-10BT:train",
        domains={"edu3": (3, 3), "edu4_5": (4, 5)},
        read={"score_key": "score", "bucket_key": "int_score"},
    ),
    "sciencepedia": Preset(source="", domains={"sciencepedia": None}, read={}),
}
ROLES: tuple[Role, ...] = ("candidates", "proxy", "validation")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for. Of `[NAME=]VALUE` options the value without a name is every dataset's.

    sources: role or `target` -> NAME=FILES values; presets: NAME or NAME=FILES.
    """

    sources: Mapping[str, Sequence[str]]
    presets: Sequence[str] = ()
    holdout: float = 0.2
    candidates_holdout: float = 0.0
    txt_documents: TextDocuments = "file"
    read: Mapping[str, Sequence[str]]  # field of ReadOptions -> [NAME=]VALUE
    buckets: Sequence[str] = ()  # NAME=LOW:HIGH
    max_documents: Sequence[str] = ()
    max_tokens: Sequence[str] = ()


def datasets_of(request: Request) -> tuple[DatasetSpec, ...]:
    """The datasets of a request. Raises PrepareError naming the option that is off."""
    grouped = {option: _grouped(option, values) for option, values in request.sources.items()}
    drawn: dict[str, tuple[tuple[str, ...], Mapping[str, str], tuple[float, float] | None]] = {
        name: (sources, {}, None) for name, sources in grouped.get("candidates", {}).items()
    }
    for value in request.presets:
        for name, entry in _preset(value).items():
            if name in drawn:
                raise PrepareError(f"--preset {value}: the domain {name} is given twice")
            drawn[name] = entry
    names = {*drawn, *(name for named in grouped.values() for name in named)}
    buckets = {name: _bucket(value) for name, value in _by_name("bucket", request.buckets, names).items()}
    _refuse_everybody("bucket", buckets)
    documents = _counts("max-documents", request.max_documents, names)
    tokens = _counts("max-tokens", request.max_tokens, names)
    keys = {key: _by_name(key.replace("_", "-"), values, names) for key, values in request.read.items()}

    def completed(spec: DatasetSpec, read: Mapping[str, str]) -> DatasetSpec:
        own: dict[str, Any] = {**read, **{k: v[spec.name] for k, v in keys.items() if spec.name in v}}
        general = {key: values[""] for key, values in keys.items() if "" in values}
        options = ReadOptions(**{"txt_documents": request.txt_documents, **general, **own}) if own else None
        spec = replace(spec, read=options)
        if spec.name in buckets:
            spec = replace(spec, bucket=buckets[spec.name])
        if spec.role == "validation":
            return spec
        everybody = "" if spec.role == "candidates" else spec.name  # a number without name bounds the candidates
        return replace(
            spec,
            max_documents=documents.get(spec.name, documents.get(everybody)),
            max_tokens=tokens.get(spec.name, tokens.get(everybody)),
        )

    found: list[DatasetSpec] = []
    for name, (sources, read, bucket) in drawn.items():
        spec = DatasetSpec(name=name, role="candidates", sources=sources, bucket=bucket)
        if request.candidates_holdout:
            held, rest = holdout(name, sources, request.candidates_holdout)
            found += [completed(replace(held, bucket=bucket), read)]
            spec = replace(spec, keep=rest.keep)
        found.append(completed(spec, read))
    for role in ROLES[1:]:
        for name, sources in grouped.get(role, {}).items():
            found.append(completed(DatasetSpec(name=name, role=role, sources=sources), {}))
    for name, sources in grouped.get("target", {}).items():
        found += [completed(spec, {}) for spec in holdout(name, sources, request.holdout)]
    return tuple(sorted(found, key=lambda spec: spec.role != "candidates"))


def general_read(request: Request, datasets: Sequence[DatasetSpec]) -> ReadOptions:
    """The options of every dataset that has none of its own."""
    names = {spec.name for spec in datasets}
    chosen = {key: _by_name(key.replace("_", "-"), given, names).get("") for key, given in request.read.items()}
    given = {key: value for key, value in chosen.items() if value is not None}
    return ReadOptions(txt_documents=request.txt_documents, **given)


def _preset(value: str) -> dict[str, tuple[tuple[str, ...], Mapping[str, str], tuple[float, float] | None]]:
    name, _, files = value.partition("=")
    if name not in PRESETS:
        raise PrepareError(f"--preset {name}: expected one of {', '.join(PRESETS)}, with =FILES for local ones")
    preset = PRESETS[name]
    source = files or preset.source
    if not source:
        raise PrepareError(
            f"--preset {name}: where it is published is not known here; give its files or repository, for example "
            f"--preset {name}='{name}/*.parquet' or {name}=hub:OWNER/NAME"
        )
    return {domain: ((source,), preset.read, bucket) for domain, bucket in preset.domains.items()}


def _grouped(option: str, values: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Sources of the same name put together."""
    found: dict[str, tuple[str, ...]] = {}
    for value in values:
        name, sep, files = value.partition("=")
        if not sep or not name or not files:
            raise PrepareError(f"--{option} {value!r}: expected NAME=FILES, for example --{option} wiki=wiki.jsonl")
        found[name] = (*found.get(name, ()), files)
    return found


def _by_name(option: str, values: Sequence[str], names: set[str]) -> dict[str, str]:
    """dataset -> value, "" for the one of every dataset. A value that begins with a dataset's name and = is its own."""
    found: dict[str, str] = {}
    for value in values:
        name, sep, rest = value.partition("=")
        if sep and name not in names and re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            # Not a value for every dataset: a mistyped name would become part of every header.
            raise PrepareError(f"--{option} {value!r}: no dataset {name!r}; there are {', '.join(sorted(names))}")
        key, text = (name, rest) if sep and name in names else ("", value)
        if key in found:
            raise PrepareError(f"--{option}: given twice for {key or 'every dataset'}")
        found[key] = text
    return found


def _refuse_everybody(option: str, values: Mapping[str, Any]) -> None:
    if "" in values:
        raise PrepareError(f"--{option}: expected NAME=LOW:HIGH with the name of a dataset")


def _bucket(value: str) -> tuple[float, float]:
    low, _, high = value.partition(":")
    try:
        bounds = float(low), float(high)
    except ValueError:
        raise PrepareError(f"--bucket {value!r}: expected NAME=LOW:HIGH with the name of a dataset") from None
    if not bounds[0] <= bounds[1]:
        raise PrepareError(f"--bucket {value!r}: expected LOW <= HIGH")
    return bounds


def _counts(option: str, values: Sequence[str], names: set[str]) -> dict[str, int]:
    return {name: _count(option, value) for name, value in _by_name(option, values, names).items()}


def _count(option: str, value: str) -> int:
    """A whole number; 10M and 30B are accepted."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    number, factor = (value[:-1], units[value[-1:].upper()]) if value[-1:].upper() in units else (value, 1)
    try:
        count = round(float(number) * factor)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise PrepareError(f"--{option} {value!r}: expected a number of at least 1, as 500000 or 30B, or NAME=NUMBER")
    return count
