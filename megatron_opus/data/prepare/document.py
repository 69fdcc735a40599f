"""A document and what is known about it: its text, spans that are not to be learned, a score, where it stands."""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from megatron_opus.errors import Refusal

TextDocuments = Literal["file", "paragraph", "line"]
Spans = tuple[tuple[int, int], ...]


class SourceError(Refusal, ValueError):
    """A source that cannot be read: names the file and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of one source. start, stop: bytes (.jsonl, .txt), row groups (.parquet) or rows (datasets).

    origin, base: what a file that was fetched from elsewhere stands for, and the documents of that before this file.
    """

    source: str
    start: int
    stop: int
    bytes: int  # for progress
    origin: str = ""
    base: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def shown(self) -> str:
        """The name that a person knows it by."""
        return self.origin or self.source


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """One document, or the reason why there is none (`text` is None)."""

    line: int  # from 1, of the shard; `line_base` gives what to add
    text: str | None
    problem: str = ""
    bytes: int = 0
    body: int = 0  # characters of the metadata header in front of the document's own text
    spans: Spans = ()  # characters [start, end) of `text` that are not to be learned, the header among them
    score: float | None = None
    bucket: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """text_key: key or column of the text. score_key: of a number that is kept for each document. bucket_key: of the
    number by which `DatasetSpec.bucket` chooses documents; empty: the score.

    mask_key: of character spans [[start, end], ...] of the text that are not to be learned. metadata_template: header
    in front of the text, not to be learned either, with keys in braces: "{title}\\n{url}\\n\\n".
    """

    text_key: str = "text"
    txt_documents: TextDocuments = "file"
    mask_key: str = ""
    metadata_template: str = ""
    score_key: str = ""
    bucket_key: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every key that is read, the text's first."""
        keys = (self.mask_key, *template_keys(self.metadata_template), self.score_key, self.bucket_key)
        names = (self.text_key, *keys)
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def plain(self) -> bool:
        """Whether the text is all that is read."""
        return not (self.mask_key or self.score_key or self.bucket_key or self.metadata_template)


@lru_cache(maxsize=16)
def template_keys(template: str) -> tuple[str, ...]:
    """Keys in braces of a metadata template. Raises SourceError for one that cannot be filled in."""
    try:
        pieces = string.Formatter().parse(template)
        parsed = [(name, form, conversion) for _, name, form, conversion in pieces if name is not None]
    except ValueError as error:
        raise SourceError(f"metadata template {template!r}: {error}; expected keys in braces, as {{title}}") from error
    for name, form, conversion in parsed:
        if form or conversion or not name.replace("_", "a").replace("-", "a").isalnum():
            found = f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            raise SourceError(f"metadata template {template!r}: expected a key in braces, as {{title}}, got {found!r}")
    return tuple(dict.fromkeys(name for name, _, _ in parsed))


def text_digest(text: str) -> tuple[int, int]:
    """(identity, split): two independent 64-bit hashes of a document, blind to differences in whitespace."""
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def record_digest(record: SourceRecord) -> tuple[int, int]:
    """`text_digest` of the document's own text: another header makes no other document."""
    text = record.text or ""
    return text_digest(text[record.body :] if record.body else text)


def read_record(line: int, fields: Mapping[str, Any], options: ReadOptions, size: int) -> SourceRecord:
    """The document of one record; `problem` names the key and what was expected of it."""

    def bad(problem: str) -> SourceRecord:
        return SourceRecord(line=line, text=None, problem=problem, bytes=size)

    for key in options.columns:
        if key not in fields:
            keys = ", ".join(map(str, list(fields)[:8])) or "none"
            hint = "; see --text-key" if key == options.text_key else ""
            return bad(f"no key {key!r} (keys: {keys}){hint}")
    text = fields[options.text_key]
    problem = _not_text(options.text_key, text)
    if problem or options.plain:
        return bad(problem) if problem else SourceRecord(line=line, text=text, bytes=size)
    try:
        spans = _spans(fields[options.mask_key], len(text)) if options.mask_key else ()
        header = _header(options.metadata_template, fields)
        score, bucket = (_number(key, fields[key]) if key else None for key in (options.score_key, options.bucket_key))
    except ValueError as error:
        return bad(str(error))
    if header:
        spans = ((0, len(header)), *((a + len(header), b + len(header)) for a, b in spans))
    bucket = bucket if options.bucket_key else score
    return SourceRecord(
        line=line, text=header + text, bytes=size, body=len(header), spans=spans, score=score, bucket=bucket
    )


def _not_text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        return f"{key!r}: expected a string, got {type(value).__name__}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{key!r}: a lone surrogate at character {error.start} is not text"
    return ""


def _header(template: str, fields: Mapping[str, Any]) -> str:
    values = {}
    for key in template_keys(template):
        value = fields[key]
        values[key] = "" if value is None else str(value)
        if problem := _not_text(key, values[key]):
            raise ValueError(problem)
    return template.format(**values)


def _spans(value: Any, length: int) -> Spans:
    """Sorted, merged, not empty. Raises ValueError for anything but [start, end] pairs within the text."""
    if value is None:
        return ()
    expected = f"spans: expected [[start, end], ...] in characters 0..{length} of the text"
    if not isinstance(value, list | tuple):
        raise ValueError(f"{expected}, got {type(value).__name__}")
    merged: list[tuple[int, int]] = []
    try:
        pairs = sorted((a, b) for a, b in value if {type(a), type(b)} == {int})
    except (TypeError, ValueError):
        pairs = []
    if len(pairs) != len(value):
        raise ValueError(f"{expected}, got {str(value)[:80]}")
    for start, end in pairs:
        if not 0 <= start <= end <= length:
            raise ValueError(f"{expected}, got [{start}, {end}]")
        if start == end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _number(key: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{key!r}: expected a finite number, got {str(value)[:80]!r}")
    return number
