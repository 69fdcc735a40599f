"""A prepared directory as sequences: fixed windows of L tokens, each with one global id, for every role.

Sequence i of a domain is tokens [i L, i L + L] of its stream (L + 1 of them: the labels are the tokens one later), so
any rank can read any sequence from the memory-mapped files when it knows the id. Ids run over the candidates, then the
proxies, then the validation sets, each in the order of the manifest.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_opus.config import DataConfig
from megatron_opus.data import manifest as manifests
from megatron_opus.data import unlearned_spans
from megatron_opus.data.excluded_documents import open_entry, open_unlearned
from megatron_opus.data.manifest import ROLES, Manifest, Role, base_directory
from megatron_opus.data.permutation import key, permute
from megatron_opus.data.proxy_weights import WeightedProxy
from megatron_opus.data.token_files import InVocabulary
from megatron_opus.data.tokenizers.base import Tokenizer, reopen_tokenizer
from megatron_opus.errors import Refusal
from megatron_opus.types import Batch, TokenDocuments

_PIECE = 1 << 20  # tokens read at once when everything is read
OpenDocuments = Callable[[str, Path], TokenDocuments]


class CorpusError(Refusal, ValueError):
    """Data that cannot serve the run: says what was expected, what was found and what to change."""


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """Where a sequence comes from."""

    sample_id: int
    role: Role
    domain: str
    index: int  # of the sequence within its domain
    start: int  # first token in the domain's stream
    stop: int  # exclusive; the label of the last position is the token at `stop`
    first_document: int  # of the domain, counting from 0
    last_document: int  # inclusive


@dataclass(frozen=True, kw_only=True)
class _Domain:
    name: str
    role: Role
    documents: TokenDocuments
    offset: int  # id of its first sequence
    sequences: int
    length: int  # tokens of each
    unlearned: np.ndarray | None  # [spans, 2] token ranges whose prediction does not count


class Corpus:
    """Sequences of one prepared directory: proxies cut at the length that scoring reads, all others at `seq_length`.

    domains: role -> domain names, in id order. fingerprint: sha256 over the tokens, the lengths and the flags; equal
    fingerprints mean that equal ids are equal sequences. Everything is read-only and thread-safe.
    """

    def __init__(
        self,
        manifest: Manifest,
        documents: Mapping[tuple[Role, str], TokenDocuments],
        tokenizer: Tokenizer,
        config: DataConfig,
        unlearned: Mapping[tuple[Role, str], np.ndarray] | None = None,
        *,
        proxy_length: int | None = None,
    ) -> None:
        """unlearned: [spans, 2] ascending token ranges of the domains that have metadata; see unlearned_spans.py.
        proxy_length: tokens of a proxy sequence; None: as many as of the others."""
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.seq_length, self.proxy_length = config.seq_length, proxy_length or config.seq_length
        self._config = config
        self._domains: list[_Domain] = []
        offset = 0
        for role in ROLES:
            for entry in manifest.of_role(role):
                stream = documents[role, entry.name]
                if stream.num_tokens != entry.tokens:
                    raise CorpusError(
                        f"domain {entry.name} ({role}): expected {entry.tokens} tokens by the manifest, found "
                        f"{stream.num_tokens}; prepare the data again"
                    )
                length = self.proxy_length if role == "proxy" else self.seq_length
                # The last token of a stream is only ever a label.
                sequences = (stream.num_tokens - 1) // length
                if sequences < 1:
                    key_of_it = "data.seq_length" if length == self.seq_length else "selection.score_length"
                    raise CorpusError(
                        f"domain {entry.name} ({role}): {stream.num_tokens} tokens give no sequence of "
                        f"{key_of_it}={length} (one takes {length + 1}); shorten it or give the domain more text"
                    )
                self._domains.append(
                    _Domain(
                        name=entry.name,
                        role=role,
                        documents=stream,
                        offset=offset,
                        sequences=sequences,
                        length=length,
                        unlearned=(unlearned or {}).get((role, entry.name)),
                    )
                )
                offset += sequences
        self._offsets = np.array([d.offset for d in self._domains], dtype=np.int64)
        self.num_sequences = offset
        self.domains: dict[Role, tuple[str, ...]] = {
            role: tuple(d.name for d in self._domains if d.role == role) for role in ROLES
        }
        self._weighted: WeightedProxy | None = None
        if config.proxy_weights:
            _check_names("data.proxy_weights: no proxy domain", config.proxy_weights, self.domains["proxy"])
            domains = {d.name: (d.offset, d.sequences) for d in self._domains if d.role == "proxy"}
            self._weighted = WeightedProxy(domains, config.proxy_weights)
        flags = (config.reset_attention_mask, config.reset_position_ids, config.eod_mask_loss)
        what = f"{manifest.fingerprint()} {self.seq_length} {flags}"
        if self.proxy_length != self.seq_length:
            what += f" {self.proxy_length}"
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()

    @classmethod
    def open(
        cls,
        directory: str | Path,
        config: DataConfig,
        open_documents: OpenDocuments,
        *,
        proxy_length: int | None = None,
    ) -> Corpus:
        """Open a directory of tools/prepare_data.py, build_proxy.py. open_documents: (name, prefix) -> TokenDocuments.
        proxy_length: tokens of a proxy sequence; None: `config.seq_length`, as of the others.

        Every token that is read is compared with the vocabulary (TokenFileError). Raises ManifestError, TokenizerError,
        MaskError, CorpusError, and what `open_documents` raises for damaged ones.
        """
        directory = Path(directory)
        manifest = manifests.read(directory)
        tokenizer = reopen_tokenizer(directory / manifests.TOKENIZER_DIRECTORY, manifest.tokenizer)
        documents = {(e.role, e.name): open_entry(directory, e, open_documents) for e in manifest.datasets}
        unlearned = {
            (e.role, e.name): open_unlearned(directory, e, documents[e.role, e.name])
            for e in manifest.datasets
            if e.mask_sha256
        }
        checked = {
            (e.role, e.name): InVocabulary(
                documents[e.role, e.name],
                tokenizer.vocab_size,
                Path(f"{base_directory(directory, e) / e.prefix}.bin"),
            )
            for e in manifest.datasets
        }
        return cls(manifest, checked, tokenizer, config, unlearned, proxy_length=proxy_length)

    def content_digests(self) -> dict[str, str]:
        """role/domain -> digest of what this process can read: every token of proxies and validation sets, document
        ends and evenly spaced sequences of the candidates. The fingerprint is what the files claim to hold."""
        digests = {}
        for d in self._domains:
            total = d.documents.num_tokens
            digest = hashlib.sha256(np.ascontiguousarray(d.documents.document_ends, dtype=np.int64).tobytes())
            if d.role == "candidates":
                spots = np.linspace(0, total - self.seq_length - 1, 64).astype(np.int64).tolist()
                pieces = [(start, self.seq_length + 1) for start in spots]
            else:
                pieces = [(start, min(_PIECE, total - start)) for start in range(0, total, _PIECE)]
            for start, length in pieces:
                digest.update(np.asarray(d.documents.tokens(start, length), dtype=np.int64).tobytes())
            if d.unlearned is not None:
                digest.update(np.ascontiguousarray(d.unlearned).tobytes())
            digests[f"{d.role}/{d.name}"] = digest.hexdigest()[:16]
        return digests

    # --- ids --------------------------------------------------------------------------------------------------------

    def sequences(self, role: Role) -> np.ndarray:
        """[domains of the role] int64: sequences in each."""
        return np.array([d.sequences for d in self._domains if d.role == role], dtype=np.int64)

    def first_ids(self, role: Role) -> np.ndarray:
        """[domains of the role] int64: id of the first sequence of each; the others follow it."""
        return np.array([d.offset for d in self._domains if d.role == role], dtype=np.int64)

    def candidate_weights(self, weights: Mapping[str, float] | None) -> np.ndarray:
        """[candidate domains] float64, sum 1: `data.domain_weights`, or the token shares where it is None.

        Domains that are not named get 0. Raises CorpusError for an unknown domain.
        """
        names = self.domains["candidates"]
        if weights is None:
            values = self.sequences("candidates").astype(np.float64)
        else:
            _check_names("data.domain_weights: no candidate domain", weights, names)
            values = np.array([float(weights.get(name, 0.0)) for name in names])
        return normalised(values)

    def proxy_shares(self) -> dict[str, float]:
        """Return proxy domain -> its share of the sequences that `proxy_ids` draws, sum 1: 0 for one without weight."""
        names, weights = self.domains["proxy"], self._config.proxy_weights
        values = [weights.get(name, 0.0) for name in names] if weights else self.sequences("proxy").tolist()
        return {name: value / sum(values) for name, value in zip(names, values, strict=True)}

    def proxy_ids(self, step: int, count: int, seed: int) -> np.ndarray:
        """[count] int64: proxy sequences of a step, a function of (seed, step) alone.

        The pool of all proxy domains is walked in a shuffled order, reshuffled when fewer than `count` are left: no
        sequence comes twice within one draw or between two shuffles. Raises CorpusError for a pool that is too small.
        With `data.proxy_weights` the domains are walked apart, see proxy_weights.py. Raises ConfigError for one that is
        too small.
        """
        if self._weighted is not None:
            return self._weighted.ids(step, count, seed)
        # Proxy domains follow each other: the pool is one range of ids.
        first, size = self.first_ids("proxy"), int(self.sequences("proxy").sum())
        if count < 1 or count > size:
            raise CorpusError(
                f"selection.proxy_batch_size: expected 1..{size}, the proxy sequences of {self.proxy_length} "
                f"tokens in this data, got {count}; lower it or prepare more proxy text"
            )
        epoch, turn = divmod(step, size // count)
        positions = np.arange(turn * count, (turn + 1) * count)
        return first[0] + permute(positions, size, key("proxy", seed, epoch))

    def validation_ids(self, domain: str, count: int) -> np.ndarray:
        """[min(count, available)] int64: the first sequences of a validation domain, always the same."""
        found = [d for d in self._domains if d.role == "validation" and d.name == domain]
        if not found:
            raise CorpusError(
                f"no validation domain {domain!r}; there are {', '.join(self.domains['validation']) or 'none'}"
            )
        return np.arange(found[0].offset, found[0].offset + min(count, found[0].sequences), dtype=np.int64)

    # --- sequences --------------------------------------------------------------------------------------------------

    def batch(self, sample_ids: Sequence[int] | np.ndarray) -> Batch:
        """The sequences of these ids, in this order, on the CPU. [B, L] each, L the length of all of them; see
        types.Batch.

        loss_mask[b, t] is 0 where labels[b, t] is a token of a metadata span, and with data.eod_mask_loss where
        tokens[b, t] ends a document.

        Raises CorpusError for an id outside of 0..num_sequences-1, and for sequences of two lengths.
        """
        ids = self._checked(sample_ids)
        length = self._length_of(ids)
        tokens = np.empty((len(ids), length + 1), dtype=np.int64)
        masked = self._config.reset_attention_mask
        bounded = masked or self._config.reset_position_ids or self._config.eod_mask_loss
        ends = np.zeros((len(ids), length), dtype=bool)
        counts = np.ones((len(ids), length), dtype=bool)
        for row, (sample_id, number) in enumerate(zip(ids, self._domain_of(ids), strict=True)):
            domain = self._domains[number]
            start = int(sample_id - domain.offset) * length
            tokens[row] = domain.documents.tokens(start, length + 1)
            if domain.unlearned is not None:
                counts[row] = ~unlearned_spans.within(domain.unlearned, start + 1, length)
            if bounded:
                ends[row, self._ends_within(domain, start) - 1] = True
        starts_after = np.zeros_like(ends)  # position opens a new document
        starts_after[:, 1:] = ends[:, :-1]
        positions = np.broadcast_to(np.arange(length), ends.shape)
        if self._config.reset_position_ids:
            positions = positions - np.maximum.accumulate(np.where(starts_after, positions, 0), axis=1)
        loss_mask = counts & ~ends if self._config.eod_mask_loss else counts
        documents = torch.from_numpy(np.cumsum(starts_after, axis=1, dtype=np.int32)) if masked else None
        stream = torch.from_numpy(tokens)
        return Batch(
            tokens=stream[:, :-1].contiguous(),
            labels=stream[:, 1:].contiguous(),
            loss_mask=torch.from_numpy(loss_mask.astype(np.float32)),
            position_ids=torch.from_numpy(np.ascontiguousarray(positions)),
            document_ids=documents,
        )

    def tokens(self, sample_ids: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return [n, L] int64: the tokens of these sequences alone, as `batch` has them. Raises CorpusError."""
        ids = self._checked(sample_ids)
        length = self._length_of(ids)
        tokens = np.empty((len(ids), length), dtype=np.int64)
        for row, (sample_id, number) in enumerate(zip(ids, self._domain_of(ids), strict=True)):
            domain = self._domains[number]
            tokens[row] = domain.documents.tokens(int(sample_id - domain.offset) * length, length)
        return torch.from_numpy(tokens)

    def describe(self, sample_id: int) -> SampleInfo:
        """Domain, place in its stream and documents of one sequence."""
        (number,) = self._domain_of(self._checked([sample_id]))
        domain = self._domains[number]
        index = int(sample_id) - domain.offset
        start, stop = index * domain.length, (index + 1) * domain.length
        first, last = np.searchsorted(domain.documents.document_ends, [start, stop - 1], side="right")
        return SampleInfo(
            sample_id=int(sample_id),
            role=domain.role,
            domain=domain.name,
            index=index,
            start=start,
            stop=stop,
            first_document=int(first),
            last_document=int(last),
        )

    def documents_of(self, sample_ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """([n] number of the stream, over all roles in id order; [n] first, [n] last document in it) of sequences."""
        ids = self._checked(sample_ids)
        numbers = self._domain_of(ids)
        first, last = np.empty_like(ids), np.empty_like(ids)
        for number in np.unique(numbers).tolist():
            here, domain = numbers == number, self._domains[number]
            start = (ids[here] - domain.offset) * domain.length
            first[here] = np.searchsorted(domain.documents.document_ends, start, side="right")
            last[here] = np.searchsorted(domain.documents.document_ends, start + domain.length - 1, side="right")
        return numbers, first, last

    def document_text(self, stream: int, document: int, most_tokens: int) -> tuple[str, int]:
        """(the text of at most so many of its first tokens, all of its tokens) of a document of a stream by number."""
        documents = self._domains[stream].documents
        start = int(documents.document_ends[document - 1]) if document else 0
        length = int(documents.document_ends[document]) - start
        ids = documents.tokens(start, min(length, most_tokens))
        return self.tokenizer.decode(ids[ids != self.tokenizer.eod].tolist()), length

    def text(self, sample_id: int) -> str:
        """The L tokens of a sequence as text; documents are separated by an empty line."""
        (number,) = self._domain_of(self._checked([sample_id]))
        domain = self._domains[number]
        start = (int(sample_id) - domain.offset) * domain.length
        ids = domain.documents.tokens(start, domain.length)
        parts = np.split(ids, np.flatnonzero(ids == self.tokenizer.eod) + 1)
        return "\n\n".join(self.tokenizer.decode(part.tolist()) for part in parts if len(part))

    def summary(self) -> list[dict[str, Any]]:
        """One record per domain: role, name, documents, tokens, sequences."""
        entries = {(e.role, e.name): e for e in self.manifest.datasets}
        return [
            {
                "role": d.role,
                "name": d.name,
                "documents": entries[d.role, d.name].documents,
                "tokens": entries[d.role, d.name].tokens,
                "sequences": d.sequences,
            }
            for d in self._domains
        ]

    def _ends_within(self, domain: _Domain, start: int) -> np.ndarray:
        """Ends (1..L, exclusive) of the documents that end inside of the L tokens from `start`."""
        ends = domain.documents.document_ends
        first, last = np.searchsorted(ends, [start + 1, start + domain.length + 1])
        return np.asarray(ends[first:last]) - start

    def _length_of(self, ids: np.ndarray) -> int:
        lengths = {self._domains[number].length for number in self._domain_of(ids)}
        if len(lengths) > 1:
            raise CorpusError(f"sample ids: expected sequences of one length, got some of {sorted(lengths)} tokens")
        return lengths.pop() if lengths else self.seq_length

    def _domain_of(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._offsets, ids, side="right") - 1

    def _checked(self, sample_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(sample_ids, dtype=np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_sequences):
            raise CorpusError(
                f"sample ids: expected 0..{self.num_sequences - 1} in this corpus, got {ids.min()}..{ids.max()}; ids "
                "belong to one data.path and one data.seq_length"
            )
        return ids


def _check_names(problem: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known) or 'none'}"
            raise CorpusError(f"{problem} {name!r}{hint}")


def normalised(weights: np.ndarray) -> np.ndarray:
    """Non-negative finite weights scaled to sum 1, float64. Raises CorpusError."""
    weights = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise CorpusError(f"domain weights: expected non-negative numbers with a positive sum, got {weights.tolist()}")
    return weights / weights.sum()
