"""Documents that overlap benchmark items, found by word n-grams.

The rule, the customary one (Brown et al. 2020, appendix C, with n = 13): a document is dropped when it shares one run
of n consecutive words with a benchmark item. An item of fewer words must occur as a whole; one of fewer than
`min_words` is not looked for. Words are runs of letters and digits, without case, after Unicode's NFKC. An item is one
string field of a benchmark record (all strings of the record, or the named fields); of a .txt file one block between
blank lines.

Memory grows with the benchmarks and never with the corpus: a number for each of their words, a hash for each n-gram.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opus.data.prepare.compressed import open_compressed
from megatron_opus.data.prepare.document import SourceError
from megatron_opus.data.prepare.records import file_sha256
from megatron_opus.files import atomic_file
from megatron_opus.rows import RowError, json_lines, parquet_rows

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".jsonl.gz", ".jsonl.zst")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, kw_only=True)
class Decontamination:
    """files: the benchmarks. n: words of a shared run. min_words: of the shortest item. fields: empty means all."""

    files: tuple[str, ...] = ()
    n: int = 13
    min_words: int = 8
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Why a document was dropped."""

    benchmark: str  # file
    benchmark_line: int  # record of the file, from 1
    field: str
    ngram: str  # the shared words


def words_of(text: str) -> list[str]:
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold())


class Benchmarks:
    """The n-grams of all items. Made by `build`, kept in one file, shared by workers through `load`.

    Hashes are sums of a word's number times an odd 64-bit constant for its place: two different runs of words have the
    same one with a chance of about 2^-63, and what is dropped is listed with its words.
    """

    def __init__(self, words: Mapping[str, int], hashes: Mapping[int, np.ndarray], items: Mapping[int, np.ndarray],
                 names: Sequence[tuple[str, int, str]], n: int) -> None:  # fmt: skip
        self._numbers = words
        self._hashes = hashes  # length in words -> [n-grams] uint64, ascending
        self._items = items  # length in words -> [n-grams] int64, index into names
        self._names = names  # file, record, field of each item
        self._places = _places(n)
        self._present = {length: _table(own) for length, own in hashes.items()}

    def find(self, text: str) -> Overlap | None:
        """The first benchmark item that the text overlaps."""
        words = words_of(text)
        numbers = np.fromiter(map(self._numbers.get, words, itertools.repeat(0)), dtype=np.uint64, count=len(words))
        for length, found in _run_hashes(numbers, self._places):
            if length not in self._hashes:
                continue
            hashes, (shift, present) = self._hashes[length], self._present[length]
            starts = np.flatnonzero(present[found >> shift])  # most runs end here, without a search
            wanted = found[starts]
            at = np.searchsorted(hashes, wanted)
            at[at == len(hashes)] = 0
            hits = np.flatnonzero(hashes[at] == wanted)
            if len(hits):
                first = hits[0]
                file, line, field = self._names[int(self._items[length][at[first]])]
                start = int(starts[first])
                return Overlap(
                    benchmark=file, benchmark_line=line, field=field, ngram=" ".join(words[start : start + length])
                )
        return None

    @classmethod
    def load(cls, path: Path) -> Benchmarks:
        with np.load(path) as data:
            meta = json.loads(bytes(data["meta"]).decode())
            words = {word: i + 1 for i, word in enumerate(meta["words"])}
            lengths = meta["lengths"]
            hashes = {m: data[f"hashes{m}"] for m in lengths}
            items = {m: data[f"items{m}"] for m in lengths}
            names = [(meta["files"][f], line, field) for f, line, field in meta["items"]]
        return cls(words, hashes, items, names, meta["n"])


class Collector:
    """Gathers the n-grams of items one by one."""

    def __init__(self, n: int, min_words: int) -> None:
        self.numbers: dict[str, int] = {}
        self.names: list[tuple[int, int, str]] = []
        self._n, self._min_words, self._places = n, min_words, _places(n)
        self._runs: dict[int, list[np.ndarray]] = {}
        self._owners: dict[int, list[np.ndarray]] = {}

    def add(self, name: tuple[int, int, str], text: str, min_words: int | None = None) -> bool:
        """Whether the text is long enough to be looked for. name: number of the file, record, field."""
        words = words_of(text)
        if len(words) < (self._min_words if min_words is None else min_words):
            return False
        length = min(len(words), self._n)
        ids = np.array([self.numbers.setdefault(word, len(self.numbers) + 1) for word in words], dtype=np.uint64)
        *_, (_, hashes) = _run_hashes(ids, self._places[:length])
        self._runs.setdefault(length, []).append(hashes)
        self._owners.setdefault(length, []).append(np.full(len(hashes), len(self.names), dtype=np.int64))
        self.names.append(name)
        return True

    def arrays(self) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """length in words -> [n-grams] uint64 hashes, ascending; and int64 indices into `names`. Longest first."""
        hashes, items = {}, {}
        for length, parts in sorted(self._runs.items(), reverse=True):
            hashes[length], first = np.unique(np.concatenate(parts), return_index=True)
            items[length] = np.concatenate(self._owners[length])[first]
        return hashes, items

    def benchmarks(self, files: Sequence[str]) -> Benchmarks:
        names = [(files[file], line, field) for file, line, field in self.names]
        return Benchmarks(self.numbers, *self.arrays(), names, self._n)


def build(config: Decontamination, path: Path) -> dict[str, Any]:
    """Write the n-grams of the benchmark files to `path`; what was read, for the manifest.

    Raises SourceError for a file that cannot be read, of an unknown format, without any text or with items that are
    all too short.
    """
    if not 1 <= config.min_words <= config.n:
        raise SourceError(f"decontamination: expected 1 <= shortest item <= n, got {config.min_words} and {config.n}")
    collected = Collector(config.n, config.min_words)
    described = []
    for index, file in enumerate(config.files):
        found = used = 0
        for line, field, text in benchmark_items(file, config.fields):
            found += 1
            used += collected.add((index, line, field), text)
        if not found:
            fields = f"in the fields {', '.join(config.fields)}" if config.fields else "in it"
            raise SourceError(f"{file}: a benchmark file with no text {fields}; see --decontaminate-fields")
        if not used:
            raise SourceError(
                f"{file}: all {found} benchmark items have fewer than {config.min_words} words; see "
                "--decontaminate-min-words"
            )
        described.append({"path": file, "sha256": file_sha256(file), "items": used, "too_short": found - used})
    hashes, items = collected.arrays()
    arrays = {f"hashes{m}": part for m, part in hashes.items()} | {f"items{m}": part for m, part in items.items()}
    meta = {
        "n": config.n,
        "words": list(collected.numbers),
        "lengths": list(hashes),
        "files": list(config.files),
        "items": collected.names,
    }
    with atomic_file(path) as stream:
        np.savez(stream, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
    return {"n": config.n, "min_words": config.min_words, "fields": list(config.fields), "files": described}


def _places(n: int) -> np.ndarray:
    """[n] odd uint64 constants, the same for ever."""
    return np.random.Generator(np.random.PCG64(0x0905)).integers(0, 1 << 63, size=n, dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)


def _run_hashes(numbers: np.ndarray, places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(length, uint64 hashes of all runs of so many words) for the lengths 1, 2, ... up to that of `places`.

    A run's hash is that of the run shorter by its last word, plus one product; sums wrap around. Words that no
    benchmark has are 0 and add nothing.
    """
    # A word's number is scattered first: small numbers times a constant would leave regular patterns.
    words = (numbers * np.uint64(0x9E3779B97F4A7C15)) ^ (numbers << np.uint64(31))
    total = np.zeros(len(words) + 1, dtype=np.uint64)
    for length in range(1, min(len(words), len(places)) + 1):
        total = total[:-1] + words[length - 1 :] * places[length - 1]
        yield length, total


def _table(hashes: np.ndarray) -> tuple[np.uint64, np.ndarray]:
    """(shift, [2^k] bool): whether some hash begins with these k bits, with some 16 places for each hash."""
    bits = min(26, max(8, int(len(hashes) * 16).bit_length()))
    shift = np.uint64(64 - bits)
    present = np.zeros(1 << bits, dtype=bool)
    present[hashes >> shift] = True
    return shift, present


_BROKEN = "the benchmark file has broken JSON"


# --- benchmark files ------------------------------------------------------------------------------------------------


def benchmark_items(file: str, fields: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(record from 1, field, text) of every string in a benchmark file; `fields`: only what lies under those keys."""
    suffix = next((s for s in SUFFIXES if file.endswith(s)), None)
    if suffix is None:
        raise SourceError(f"{file}: an unknown benchmark format; expected a {', '.join(SUFFIXES)} file")
    if not Path(file).is_file():
        raise SourceError(f"{file}: no such benchmark file")
    try:
        for line, record in _benchmark_records(file, suffix):
            if fields and isinstance(record, Mapping):
                record = {key: value for key, value in record.items() if key in fields}  # noqa: PLW2901
            for name, text in _strings("", record):
                yield line, name or "text", text
    except RowError as error:
        cause = error.__cause__
        if isinstance(cause, UnicodeDecodeError):
            raise SourceError(f"{file}: the benchmark file is not UTF-8: {cause}") from error
        raise SourceError(str(error)) from error
    except (OSError, EOFError) as error:
        raise SourceError(f"{file}: the benchmark file cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{file}: the benchmark file is not UTF-8: {error}") from error


def _benchmark_records(file: str, suffix: str) -> Iterator[tuple[int, Any]]:
    if suffix == ".parquet":
        yield from parquet_rows(file, "the benchmark file is no readable Parquet")
    elif suffix == ".txt":
        blocks = re.split(r"\n\s*\n", Path(file).read_text(encoding="utf-8"))
        yield from enumerate((block for block in blocks if block.strip()), 1)
    elif suffix in (".jsonl.gz", ".jsonl.zst"):
        with open_compressed(file) as stream:
            yield from json_lines(file, stream, _BROKEN)
    else:
        content = Path(file).read_bytes()
        if suffix == ".json":
            try:
                whole = json.loads(content.decode("utf-8-sig"))
            except ValueError:  # records line by line under this name are common
                yield from json_lines(file, content.splitlines(), _BROKEN)
                return
            if isinstance(whole, Mapping):
                lists = [value for value in whole.values() if isinstance(value, list)]
                whole = lists[0] if len(lists) == 1 and len(lists[0]) > 1 else [whole]
            yield from enumerate(whole if isinstance(whole, list) else [whole], 1)
        else:
            yield from json_lines(file, content.splitlines(), _BROKEN)


def _strings(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _strings(f"{name}[{i}]", inner)
