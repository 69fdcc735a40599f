"""Similarity of every candidate document to the benchmarks, a piece of the corpus at a time.

The corpus is cut into pieces by its token counts alone. A piece that is scored leaves one file of 25 bytes per document
under its own name; what it holds depends on the piece, the encoder and the benchmarks, never on what ran before or
beside it. So an interrupted pass goes on where it stopped, and parts of it can run on several machines.
Vectors are not kept: memory holds one batch of them and those of the benchmarks, and 8 bytes per document of the index.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from megatron_opus.data import manifest as manifests
from megatron_opus.data import unlearned_spans
from megatron_opus.data.benchmarks.items import BenchmarkItem, digest
from megatron_opus.data.excluded_documents import open_entry, open_unlearned
from megatron_opus.data.permutation import uniform
from megatron_opus.data.prepare.records import text_digest
from megatron_opus.data.proxy import encoders
from megatron_opus.data.proxy.benchmark_overlap import BenchmarkText
from megatron_opus.data.proxy.encoders import Encoder, EncoderError, LexicalEncoder, Nearest
from megatron_opus.data.tokenizers.base import reopen_tokenizer
from megatron_opus.errors import Refusal
from megatron_opus.files import atomic_file, write_json
from megatron_opus.types import TokenDocuments

RECORD = np.dtype(
    [
        ("score", "<f4"),  # similarity; of a random proxy: uniform in [0, 1), by the text's hash
        ("nearest", "<i4"),  # benchmark item; -1: none was compared with
        ("digest", "<u8"),  # of the text, blind to whitespace: what counts as the same document
        ("overlap", "<i4"),  # benchmark item whose text the document contains; -1: none
        ("tokens", "<i4"),
        ("cut", "?"),  # only the beginning was compared
    ]
)
SETTINGS = "settings.json"
_PIECE_TOKENS = 1 << 22
_BATCH_DOCUMENTS = 256
_BATCH_TOKENS = 1 << 19
_ITEM_BLOCK = 2048


class ProxyError(Refusal, ValueError):
    """A proxy that cannot be built: says what was expected, what was found and what to change."""


@dataclass(frozen=True, kw_only=True)
class DocumentRange:
    """Documents first..stop-1 of one candidate domain."""

    number: int
    domain: int
    first: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Document:
    domain: int
    number: int
    start: int  # first token in its stream
    ids: np.ndarray  # [tokens] int64, the end-of-document token last


class CandidateDocuments:
    """The candidate documents of a prepared directory, one at a time.

    views: whether the directory may refer to the files of another one, as a corpus with a built proxy does.
    """

    def __init__(
        self, directory: Path, open_documents: Callable[[str, Path], TokenDocuments], *, views: bool = False
    ) -> None:
        self.directory = directory
        self.manifest = manifests.read(directory)
        if not views and any(entry.base for entry in self.manifest.datasets):
            raise ProxyError(
                f"{directory}: already is a corpus with a built proxy; give the one that it was made from "
                "(tools/prepare_data.py)"
            )
        self.tokenizer = reopen_tokenizer(directory / manifests.TOKENIZER_DIRECTORY, self.manifest.tokenizer)
        self.entries = self.manifest.of_role("candidates")
        self.streams = [open_entry(directory, e, open_documents) for e in self.entries]
        self.unlearned = [
            open_unlearned(directory, e, s) if e.mask_sha256 else None
            for e, s in zip(self.entries, self.streams, strict=True)
        ]

    def pieces(self, tokens: int | None = None) -> list[DocumentRange]:
        """Consecutive documents of about `tokens` tokens (default 4 M), each in one piece."""
        size = tokens or _PIECE_TOKENS
        found: list[DocumentRange] = []
        for domain, stream in enumerate(self.streams):
            ends = stream.document_ends
            marks = np.arange(size, stream.num_tokens, size)
            bounds = np.unique(np.concatenate([[0], np.searchsorted(ends, marks) + 1, [len(ends)]]))
            for first, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                found.append(DocumentRange(number=len(found), domain=domain, first=first, stop=stop))
        return found

    def read(self, piece: DocumentRange) -> Iterator[Document]:
        stream = self.streams[piece.domain]
        ends = stream.document_ends
        start = int(ends[piece.first - 1]) if piece.first else 0
        for number in range(piece.first, piece.stop):
            stop = int(ends[number])
            yield Document(domain=piece.domain, number=number, start=start, ids=stream.tokens(start, stop - start))
            start = stop

    def one(self, domain: int, number: int) -> Document:
        return next(self.read(DocumentRange(number=0, domain=domain, first=number, stop=number + 1)))

    def unlearned_within(self, document: Document) -> np.ndarray:
        """[n, 2] int64: the token ranges of the document, from its first token, that are not learned."""
        spans = self.unlearned[document.domain]
        if spans is None:
            return np.empty((0, 2), dtype=np.int64)
        return unlearned_spans.ranges(unlearned_spans.within(spans, document.start, len(document.ids)))

    def own_text(self, document: Document, text: str) -> str:
        """Its text without the metadata that is not learned: another header makes no other document."""
        spans = self.unlearned[document.domain]
        if spans is None:
            return text
        left = document.ids[~unlearned_spans.within(spans, document.start, len(document.ids))]
        return self.tokenizer.decode(left.tolist())

    def text(self, document: Document, first: int = 0, stop: int | None = None) -> str:
        return self.tokenizer.decode(document.ids[first:stop].tolist())


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is scored and how. encoder: None for a random proxy, whose score is a hash of (seed, text).

    windows: `first` compares the first window of a document, `all` takes the largest similarity of its windows.
    part: (i, n): only pieces i, i + n, i + 2 n, ... of the pass, for n processes that share `directory`.
    """

    directory: Path
    items: Sequence[BenchmarkItem]
    encoder: Encoder | None
    windows: Literal["first", "all"] = "first"
    seed: int = 0
    part: tuple[int, int] = (0, 1)
    progress: bool = True

    def settings(self, documents: CandidateDocuments) -> dict[str, Any]:
        """Everything that the scores depend on."""
        return {"corpus": documents.manifest.fingerprint(), **self.choices()}

    def choices(self) -> dict[str, Any]:
        """Everything that the scores depend on beside the corpus."""
        chosen: dict[str, Any] = {"seed": self.seed}
        if self.encoder is not None:
            chosen = {**self.encoder.identity(), "windows": self.windows, "window": self.encoder.window}
        by_name: dict[str, list[BenchmarkItem]] = {}
        for item in self.items:
            by_name.setdefault(item.benchmark, []).append(item)
        return {
            "benchmarks": {n: f"{len(i)} items, sha256 {digest(i)[:16]}" for n, i in by_name.items()},
            "order": digest(self.items)[:16],
            "piece_tokens": _PIECE_TOKENS,
            **chosen,
        }


def refuse_difference(where: str, then: dict[str, Any], now: dict[str, Any], remedy: str) -> None:
    """Raises ProxyError naming the first setting that is not what it was."""
    now = json.loads(json.dumps(now))  # tuples and lists compare equal
    for key in dict.fromkeys([*then, *now]):
        if then.get(key) != now.get(key):
            raise ProxyError(
                f"{where} was made with other settings ({key}: then {then.get(key, 'absent')}, now "
                f"{now.get(key, 'absent')}); {remedy}"
            )


class Scorer:
    """The pass over the corpus. `run` scores what is missing, `read` gives a piece's records."""

    def __init__(self, documents: CandidateDocuments, scoring: Scoring) -> None:
        self.documents = documents
        self.scoring = scoring
        self.pieces = documents.pieces()
        self.settings = scoring.settings(documents)
        self._root = scoring.directory
        self._overlap: BenchmarkText | None = None
        path = self._root / SETTINGS
        if path.exists():
            remedy = "use the same ones, another directory for the scores, or remove this one"
            refuse_difference(f"{self._root}", json.loads(path.read_text(encoding="utf-8")), self.settings, remedy)
        else:
            self._root.mkdir(parents=True, exist_ok=True)
            write_json(path, self.settings)

    def run(self) -> None:
        """Raises EncoderError, and what reading the corpus raises; what is scored by then stays."""
        part, parts = self.scoring.part
        mine = [p for p in self.pieces if p.number % parts == part]
        missing = [p for p in mine if not self._path(p).exists()]
        if not missing:
            return
        encoder = self.scoring.encoder
        if isinstance(encoder, LexicalEncoder):
            self._count(encoder)
        nearest = Nearest(self._item_vectors(encoder), encoder.device) if encoder is not None else None
        with self._bar("scoring ", mine, missing) as bar:
            for piece in missing:
                records = list(self._score(piece, encoder, nearest, bar))
                with atomic_file(self._path(piece)) as stream:
                    np.save(stream, np.concatenate(records))

    @property
    def overlap(self) -> BenchmarkText | None:
        """What is looked for in documents; made at the first use."""
        if self._overlap is None and self.scoring.items:
            self._overlap = BenchmarkText(self.scoring.items)
        return self._overlap

    def unscored(self) -> int:
        """Pieces that no run has scored yet."""
        return sum(not self._path(piece).exists() for piece in self.pieces)

    def read(self, piece: DocumentRange) -> np.ndarray:
        """[documents of the piece] RECORD. Raises ProxyError for a damaged file."""
        try:
            found = np.load(self._path(piece))
        except (OSError, ValueError) as error:
            raise ProxyError(f"{self._path(piece)}: not readable ({error}); remove it and run again") from error
        if found.dtype != RECORD or len(found) != piece.stop - piece.first:
            raise ProxyError(
                f"{self._path(piece)}: expected {piece.stop - piece.first} records, found {len(found)} of "
                f"{len(found.dtype)} fields; remove it and run again"
            )
        return found

    # --- passes -----------------------------------------------------------------------------------------------------

    def _score(
        self, piece: DocumentRange, encoder: Encoder | None, nearest: Nearest | None, bar: Any
    ) -> Iterator[np.ndarray]:
        overlap = self.overlap
        for batch in self._batches(piece):
            records = np.zeros(len(batch), dtype=RECORD)
            records["nearest"] = records["overlap"] = -1
            texts = [self.documents.text(document) for document in batch]
            for record, document, text in zip(records, batch, texts, strict=True):
                record["digest"] = text_digest(self.documents.own_text(document, text))[0]
                record["tokens"] = len(document.ids)
                found = overlap.find(text) if overlap is not None else None
                record["overlap"] = -1 if found is None else found
            if encoder is None or nearest is None:
                records["score"] = [uniform("std proxy", self.scoring.seed, int(d)) for d in records["digest"]]
            else:
                self._compare(records, batch, texts, encoder, nearest)
            yield records
            bar.update(int(records["tokens"].sum()))

    def _compare(
        self, records: np.ndarray, batch: list[Document], texts: list[str], encoder: Encoder, nearest: Nearest
    ) -> None:
        windows: list[str] = []
        owner: list[int] = []
        for i, (document, text) in enumerate(zip(batch, texts, strict=True)):
            length, whole = encoder.window, len(document.ids)
            if length is None or whole <= length:
                mine = [text]
            elif self.scoring.windows == "first":
                mine = [self.documents.text(document, 0, length)]
                records["cut"][i] = True
            else:
                mine = [self.documents.text(document, s, s + length) for s in range(0, whole, length)]
            windows += mine
            owner += [i] * len(mine)
        owners = np.array(owner)
        records["cut"][owners[encoder.too_long(windows)]] = True
        starts = range(0, len(windows), _BATCH_DOCUMENTS)  # a long document has many windows
        found = [nearest.best(encoder.encode_documents(windows[s : s + _BATCH_DOCUMENTS])) for s in starts]
        scores, items = (np.concatenate(part) for part in zip(*found, strict=True))
        # The last of the ascending order of each document is its best window, the first one among equals.
        order = np.lexsort((-np.arange(len(scores)), scores, owners))
        best = order[np.append(np.flatnonzero(np.diff(owners)), len(owners) - 1)]
        records["score"], records["nearest"] = scores[best], items[best]

    def _count(self, encoder: LexicalEncoder) -> None:
        """The idf of the whole corpus and the benchmarks; what is counted so far is kept with the scores."""
        path = self._root / "counts.npz"
        done = 0
        if path.exists():
            with np.load(path) as state:
                done, encoder.texts, encoder.having = int(state["pieces"]), int(state["texts"]), state["having"]
        else:
            encoder.count([item.text() for item in self.scoring.items])
        left = self.pieces[done:]
        if not left:
            return
        if self.scoring.part[1] > 1:
            raise ProxyError(
                "the lexical encoder counts the words of the whole corpus before anything is scored: run once without "
                "--part (it can be interrupted when it begins to score), then in parts"
            )
        with self._bar("counting", self.pieces, left) as bar:
            for piece in left:
                for batch in self._batches(piece):
                    encoder.count([self.documents.text(document) for document in batch])
                    bar.update(sum(len(document.ids) for document in batch))
                with atomic_file(path) as stream:
                    np.savez(stream, pieces=piece.number + 1, texts=encoder.texts, having=encoder.having)

    def _item_vectors(self, encoder: Encoder) -> encoders.Matrix:
        """Vectors of all benchmark items. A model's are kept, as they take hours on a CPU; words are hashed again."""
        texts = [item.text() for item in self.scoring.items]
        if isinstance(encoder, LexicalEncoder):
            return encoder.encode_items(texts)
        blocks = []
        for start in tqdm(
            range(0, len(texts), _ITEM_BLOCK), desc="benchmarks", unit="block", disable=not self.scoring.progress
        ):
            path = self._root / f"items-{start // _ITEM_BLOCK:04d}.npy"
            if not path.exists():
                vectors = encoder.encode_items(texts[start : start + _ITEM_BLOCK])
                with atomic_file(path) as stream:
                    np.save(stream, vectors)
            blocks.append(np.load(path))
        if not blocks:
            raise EncoderError("nothing to compare with: there is no benchmark item")
        return np.concatenate(blocks)

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _path(self, piece: DocumentRange) -> Path:
        return self._root / f"{piece.number:06d}.npy"

    def _batches(self, piece: DocumentRange) -> Iterator[list[Document]]:
        """Bounded in documents and in tokens; a function of the piece alone."""
        batch: list[Document] = []
        tokens = 0
        for document in self.documents.read(piece):
            batch.append(document)
            tokens += len(document.ids)
            if len(batch) >= _BATCH_DOCUMENTS or tokens >= _BATCH_TOKENS:
                yield batch
                batch, tokens = [], 0
        if batch:
            yield batch

    def _bar(self, title: str, pieces: Sequence[DocumentRange], left: Sequence[DocumentRange]) -> Any:
        def tokens(part: Sequence[DocumentRange]) -> int:
            ends = [self.documents.streams[p.domain].document_ends for p in part]
            return sum(int(e[p.stop - 1] - (e[p.first - 1] if p.first else 0)) for e, p in zip(ends, part, strict=True))

        total = tokens(pieces)
        return tqdm(
            total=total, initial=total - tokens(left), desc=title, unit="tok", unit_scale=True,
            disable=not self.scoring.progress, mininterval=0.5,
        )  # fmt: skip
