"""Tokenizers behind one small interface: SentencePiece, GPT-2's byte-pair encoding, any Hugging Face `tokenizer.json`.

A tokenizer is its files: `save` copies them into a prepared data directory and returns the description that the
manifest keeps, `reopen_tokenizer` turns both into the same tokenizer again and refuses files that have changed.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opus.errors import Refusal

KINDS = ("sentencepiece", "gpt2", "hf")
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOD>", "<|eod|>")


class TokenizerError(Refusal, ValueError):
    """Tokenizer files or settings that cannot be used: says what was expected, what was found and what to change."""


class Tokenizer(ABC):
    """Text to ids and back. `encode` never adds a special token, and never reads one out of the text.

    files: name -> content, the whole definition; fingerprint: sha256 over kind, files and the end-of-document id.
    """

    kind: str

    def __init__(self, files: Mapping[str, bytes], vocab_size: int, eod: int) -> None:
        if not 0 <= eod < vocab_size:
            raise TokenizerError(f"end-of-document id: expected 0..{vocab_size - 1}, got {eod}")
        self.files = dict(files)
        self.vocab_size = vocab_size
        self.eod = eod
        digest = hashlib.sha256(f"{self.kind}\n{eod}\n".encode())
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}\n{len(content)}\n".encode())
            digest.update(content)
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abstractmethod
    def offsets(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Ids as `encode` gives them, and [tokens] int64 first and exclusive last character of each token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, end-of-document tokens left out."""

    @abstractmethod
    def token_texts(self, token: int) -> list[str]:
        """Give the ways to write one token: as the vocabulary has it, and as it is decoded."""

    def refuse_eod_in_text(self) -> None:
        """Raise TokenizerError where text that holds the end-of-document token's name gives the token itself."""
        for name in self.token_texts(self.eod):
            for text in (name, f"a {name} b", f"a{name}b"):
                if name and self.eod in self.encode(text):
                    raise TokenizerError(
                        f"end of document: expected a token that no text gives, found that {text!r} gives token "
                        f"{self.eod}: a document that holds it would end there. Make the token a special (tokenizer."
                        "json) or control (SentencePiece) one, or name another one with --eod"
                    )

    def save(self, directory: str | Path) -> dict[str, Any]:
        """Copy the files into `directory`; returns the description that `reopen_tokenizer` needs."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        return {
            "kind": self.kind,
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.files.items())},
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "fingerprint": self.fingerprint,
        }


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; the end of a document is its `eos` piece unless `eod` names another one."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, eod: str | int | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
        if eod is None:
            eod = int(self._model.eos_id())
            if eod < 0:
                raise TokenizerError("this SentencePiece model has no eos piece; name the piece that ends a document")
        elif isinstance(eod, str):
            name, eod = eod, int(self._model.piece_to_id(eod))
            if self._model.id_to_piece(eod) != name:
                raise TokenizerError(f"end of document {name!r}: no such piece in this SentencePiece model")
        super().__init__({"sentencepiece.model": model}, int(self._model.vocab_size()), eod)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), num_threads=1)

    def offsets(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        from sentencepiece import sentencepiece_pb2

        parsed = sentencepiece_pb2.SentencePieceText()
        parsed.ParseFromString(self._model.encode(text, out_type="serialized_proto"))
        pieces = parsed.pieces
        # Its offsets are bytes: characters are counted by the bytes that begin one.
        begins = (np.frombuffer(text.encode("utf-8"), dtype=np.uint8) & 0xC0) != 0x80
        characters = np.concatenate([[0], np.cumsum(begins, dtype=np.int64)])
        edges = np.array([(p.begin, p.end) for p in pieces], dtype=np.int64).reshape(-1, 2)
        return [p.id for p in pieces], characters[edges[:, 0]], characters[edges[:, 1]]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if i != self.eod])

    def token_texts(self, token: int) -> list[str]:
        piece = str(self._model.id_to_piece(token))
        return [piece, piece.replace("\u2581", " ")]


class _LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    _backend: Any

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        found = self._backend.encode(text, add_special_tokens=False)
        edges = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        return found.ids, edges[:, 0], edges[:, 1]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids if i != self.eod], skip_special_tokens=False)

    def token_texts(self, token: int) -> list[str]:
        return [self._backend.id_to_token(token) or "", self._backend.decode([token], skip_special_tokens=False)]

    def definition(self) -> str:
        """The same tokenizer as the text of a tokenizer.json."""
        return self._backend.to_str()


class HuggingFaceTokenizer(_LibraryTokenizer):
    """Any `tokenizer.json`. `eod` names the token that ends a document where the file does not make it obvious."""

    kind = "hf"

    def __init__(self, content: bytes, eod: str | int | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"not a Hugging Face tokenizer.json: {error}") from error
        backend.no_padding()
        backend.no_truncation()
        # "<|endoftext|>" typed inside a document is text: it must not end the document.
        backend.encode_special_tokens = True
        # Special tokens are not wanted, and byte-level post-processors would trim spaces off the tokens' offsets.
        backend.post_processor = None
        self._backend = backend
        # Ids may have gaps: the count of tokens is then less than the largest id.
        vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__({"tokenizer.json": content}, vocab_size, _find_eod(backend, eod))


class GPT2Tokenizer(_LibraryTokenizer):
    """GPT-2's byte-level byte-pair encoding from its vocabulary and merges; gives GPT-2's ids."""

    kind = "gpt2"

    def __init__(self, vocabulary: bytes, merges: bytes, eod: str | int | None = None) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        try:
            vocab = json.loads(vocabulary)
            pairs = [_merge(line) for line in merges.decode("utf-8").split("\n") if line and line[:8] != "#version"]
            backend = Backend(models.BPE(vocab=vocab, merges=pairs))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"not a GPT-2 vocabulary and merges: {error}") from error
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        self._backend = backend
        files = {"vocab.json": vocabulary, "merges.txt": merges}
        super().__init__(files, max(vocab.values()) + 1, _find_eod(backend, eod))


def _merge(line: str) -> tuple[str, str]:
    left, sep, right = line.rstrip("\r").partition(" ")
    if not sep or not right or " " in right:
        raise ValueError(f"merge {line!r} is not two pieces")
    return left, right


def _find_eod(backend: Any, eod: str | int | None) -> int:
    if isinstance(eod, int):
        return eod
    if eod is not None:
        found = backend.token_to_id(eod)
        if found is None:
            raise TokenizerError(f"end of document {eod!r}: no such token in this tokenizer")
        return found
    names = [name for name in _EOD_NAMES if backend.token_to_id(name) is not None]
    if len(names) != 1:
        raise TokenizerError(
            f"end of document: expected one of {', '.join(_EOD_NAMES)} in the vocabulary, found "
            f"{', '.join(names) or 'none of them'}; name the token with --eod"
        )
    return backend.token_to_id(names[0])


# --- loading --------------------------------------------------------------------------------------------------------


def load_tokenizer(spec: str, eod: str | None = None) -> Tokenizer:
    """Tokenizer of `gpt2:DIR`, `sentencepiece:FILE` or `hf:tokenizer.json` (a directory that has one also does).

    Raises TokenizerError naming the missing file or the spec's expected form, or where text could end a document.
    """
    tokenizer = _load(spec, eod)
    tokenizer.refuse_eod_in_text()
    return tokenizer


def _load(spec: str, eod: str | None) -> Tokenizer:
    kind, _, path_text = spec.partition(":")
    path = Path(path_text)
    if kind not in KINDS or not path_text:
        raise TokenizerError(
            f"tokenizer {spec!r}: expected gpt2:DIR, sentencepiece:FILE, hf:tokenizer.json or train-sentencepiece"
        )
    if kind == "gpt2":
        for vocabulary, merges in GPT2_FILES:
            if (path / vocabulary).is_file() and (path / merges).is_file():
                return GPT2Tokenizer((path / vocabulary).read_bytes(), (path / merges).read_bytes(), eod)
        pairs = " or ".join(" + ".join(pair) for pair in GPT2_FILES)
        raise TokenizerError(f"tokenizer {spec!r}: expected {pairs} in the directory {path}")
    if kind == "hf" and path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"tokenizer {spec!r}: {path} is not a file")
    content = path.read_bytes()
    return SentencePieceTokenizer(content, eod) if kind == "sentencepiece" else HuggingFaceTokenizer(content, eod)


def reopen_tokenizer(directory: str | Path, description: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `save` put into `directory`. Raises TokenizerError where a file is missing or has changed."""
    directory = Path(directory)
    files = {}
    for name, expected in description["files"].items():
        try:
            files[name] = (directory / name).read_bytes()
        except FileNotFoundError:
            raise TokenizerError(f"tokenizer file {directory / name} is missing; prepare the data again") from None
        found = hashlib.sha256(files[name]).hexdigest()
        if found != expected:
            raise TokenizerError(
                f"tokenizer file {directory / name}: expected sha256 {expected}, found {found}; the tokens were made "
                "with another tokenizer, restore the file or prepare the data again"
            )
    kind, eod = description["kind"], int(description["eod"])
    tokenizer: Tokenizer
    if kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer(files["sentencepiece.model"], eod)
    elif kind == "gpt2":
        tokenizer = GPT2Tokenizer(files["vocab.json"], files["merges.txt"], eod)
    elif kind == "hf":
        tokenizer = HuggingFaceTokenizer(files["tokenizer.json"], eod)
    else:
        raise TokenizerError(f"tokenizer kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if tokenizer.fingerprint != description["fingerprint"]:
        raise TokenizerError(
            f"tokenizer in {directory}: expected fingerprint {description['fingerprint']}, got {tokenizer.fingerprint}"
        )
    return tokenizer


# --- training -------------------------------------------------------------------------------------------------------


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """A byte-pair SentencePiece model that loses nothing: no normalisation, all whitespace kept, bytes as a fallback.

    The same texts in the same order give the same model. Raises TokenizerError when the text is too small for
    `vocab_size` pieces.
    """
    import sentencepiece

    out = io.BytesIO()
    raised: list[Exception] = []

    def lines() -> Iterator[str]:
        # The trainer turns an exception of its iterator into its own: keep it, it names the broken source.
        try:
            yield from _lines(texts)
        except Exception as error:
            raised.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            max_sentence_length=1 << 16,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            user_defined_symbols=["\n"],  # trained line by line, so that no piece crosses one
            num_threads=1,  # the merges must not depend on the machine
            minloglevel=2,
        )
    except Exception as error:
        if raised:
            raise raised[0] from None
        raise TokenizerError(
            f"SentencePiece could not be trained with vocab_size {vocab_size}: {error}; "
            "give more text or a smaller vocabulary"
        ) from error
    return SentencePieceTokenizer(out.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            if line:
                yield line[: 1 << 14]  # the trainer drops longer ones without a word
