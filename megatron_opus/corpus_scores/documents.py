"""The candidate documents of a corpus in blocks, a sample of them, and text to compare them with.

    piece   about 4M tokens of one domain: what is scored and kept as one file
    block   about 256k tokens of a piece: what a scorer sees at once

A slow scorer asks for smaller ones. Both are functions of the corpus and the scorer, so that a score depends on
neither interruptions nor parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_opus.data.benchmarks.items import BenchmarkItem, load_benchmarks
from megatron_opus.data.excluded_documents import open_entry
from megatron_opus.data.permutation import key, permute
from megatron_opus.data.prepare.records import ReadOptions, plan_shards, read_shard
from megatron_opus.data.proxy.similarity import CandidateDocuments, DocumentRange
from megatron_opus.errors import Refusal
from megatron_opus.types import TokenDocuments

PROXY = "proxy"  # as a target: the documents of the corpus's own proxy
_BLOCK_TOKENS = 1 << 18
_NEIGHBOURS = 16  # documents that a sample takes together: reading single ones costs more than they do
_SHARD_BYTES = 1 << 26
_TEXTS = 1024  # of a target, tokenized at once
_ITEM_TOKENS = 512


class ScoreError(Refusal, ValueError):
    """Scores that cannot be made or used: says what was expected, what was found and what to change."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive documents of one stream, each ended by the end-of-document token.

    ids: [tokens] int64. ends: [documents] int64, exclusive ends in `ids`.
    piece, first: where they are from; a target's blocks are from nowhere (None, 0).
    """

    ids: np.ndarray
    ends: np.ndarray
    piece: DocumentRange | None = None
    first: int = 0

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def starts(self) -> np.ndarray:
        """Return [documents] int64, the first token of each."""
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64)

    def documents(self) -> list[np.ndarray]:
        """Return the ids of each document, the end-of-document token last."""
        return np.split(self.ids, self.ends[:-1])


class CorpusDocuments(CandidateDocuments):
    """The candidates of a prepared directory: one of `prepare-data`, `build-proxy` or `keep`."""

    def __init__(self, directory: Path, open_documents: Callable[[str, Path], TokenDocuments]) -> None:
        super().__init__(directory, open_documents, views=True)
        self._open = open_documents
        if not self.entries:
            raise ScoreError(f"{directory}: expected candidates to score, found none; prepare a corpus with some")

    def blocks(self, piece: DocumentRange, tokens: int | None = None) -> Iterator[Block]:
        """Yield the documents of a piece in order, about `tokens` tokens at once (default 256k)."""
        yield from _blocks(self.streams[piece.domain], piece, tokens)

    def tokens_of(self, piece: DocumentRange) -> int:
        """Count the tokens of a piece."""
        ends = self.streams[piece.domain].document_ends
        return int(ends[piece.stop - 1] - (ends[piece.first - 1] if piece.first else 0))

    def sample(self, tokens: int, seed: int) -> Iterator[Block]:
        """Yield at least `tokens` tokens of candidates in random places, or all of them where there are fewer.

        Every document has the same chance, whatever its length and domain: 16 neighbours at a time, without
        replacement, as a function of the corpus and `seed`.
        """
        counts = np.array([len(stream.document_ends) for stream in self.streams], dtype=np.int64)
        if sum(stream.num_tokens for stream in self.streams) <= tokens:
            for piece in self.pieces():
                yield from self.blocks(piece)
            return
        groups = -(-counts // _NEIGHBOURS)
        before = np.concatenate([[0], np.cumsum(groups)])
        total, left = int(before[-1]), tokens
        for position in range(total):
            if left <= 0:
                return
            group = int(permute(np.array([position]), total, key("score sample", seed))[0])
            domain = int(np.searchsorted(before, group, side="right")) - 1
            first = (group - int(before[domain])) * _NEIGHBOURS
            stop = min(first + _NEIGHBOURS, int(counts[domain]))
            for block in _blocks(self.streams[domain], DocumentRange(number=-1, domain=domain, first=first, stop=stop)):
                left -= len(block.ids)
                yield block

    def target(self, sources: Sequence[str]) -> Iterator[Block]:
        """Yield the documents of a target, tokenized as the corpus is.

        sources: files of text (.jsonl, .parquet, .txt, ...), NAME=FILE for a benchmark, or `proxy` for the corpus's
        own proxy. Raises ScoreError where they hold no text, and what reading them raises.
        """
        found = 0
        for source in sources:
            blocks = self._proxy() if source == PROXY else self._tokenized(_texts(source))
            for block in blocks:
                found += len(block)
                yield block
        if not found:
            raise ScoreError(f"target {', '.join(sources)}: expected documents, found none; give files with text")

    def target_items(self, sources: Sequence[str]) -> list[BenchmarkItem]:
        """Return the texts of a target as items to be similar to: the first 512 tokens of each document."""
        texts = (
            self.tokenizer.decode(ids[:_ITEM_TOKENS].tolist())
            for block in self.target(sources)
            for ids in block.documents()
        )
        return [
            BenchmarkItem(benchmark="target", id=str(i), context="", question=text, choices=(), gold=None)
            for i, text in enumerate(texts)
        ]

    def _proxy(self) -> Iterator[Block]:
        entries = self.manifest.of_role("proxy")
        if not entries:
            raise ScoreError(
                f"{self.directory}: target `{PROXY}` needs a corpus with a proxy, found none; make one with "
                "`megatron-opus build-proxy`, or name files of text"
            )
        for entry in entries:
            stream = open_entry(self.directory, entry, self._open)
            whole = DocumentRange(number=-1, domain=-1, first=0, stop=len(stream.document_ends))
            for block in _blocks(stream, whole):
                yield Block(ids=block.ids, ends=block.ends)

    def _tokenized(self, texts: Iterator[str]) -> Iterator[Block]:
        while batch := [text for _, text in zip(range(_TEXTS), texts, strict=False)]:
            encoded = self.tokenizer.encode_batch(batch)
            ids = np.concatenate([np.array([*one, self.tokenizer.eod], dtype=np.int64) for one in encoded])
            yield Block(ids=ids, ends=np.cumsum([len(one) + 1 for one in encoded], dtype=np.int64))


def _blocks(stream: TokenDocuments, piece: DocumentRange, tokens: int | None = None) -> Iterator[Block]:
    ends, size = stream.document_ends, tokens or _BLOCK_TOKENS
    first = piece.first
    while first < piece.stop:
        start = int(ends[first - 1]) if first else 0
        stop = min(max(int(np.searchsorted(ends, start + size)), first + 1), piece.stop)
        ids = stream.tokens(start, int(ends[stop - 1]) - start)
        yield Block(ids=ids, ends=np.asarray(ends[first:stop]) - start, piece=piece, first=first)
        first = stop


def _texts(source: str) -> Iterator[str]:
    name, sep, path = source.partition("=")
    if sep and not Path(source).exists():
        yield from (item.text() for item in load_benchmarks([(name, path)]))
        return
    if not Path(source).is_file():
        raise ScoreError(
            f"target {source}: expected a file of text, NAME=FILE of a benchmark, or `{PROXY}`; found no such file"
        )
    options = ReadOptions()
    for shard in plan_shards(source, _SHARD_BYTES, options):
        for record in read_shard(shard, options):
            if record.text is None:
                raise ScoreError(f"target {source}, record {record.line}: {record.problem}; repair it or leave it out")
            if record.text.strip():
                yield record.text
