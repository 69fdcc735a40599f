from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from data_helpers import make_text

from megatron_opus.data.tokenizers import base as tokenizers
from megatron_opus.data.tokenizers.base import TokenizerError

NASTY = "def f(x):\n\treturn  x \n\n\n  naïve 日本 \U0001f600 <|endoftext|></s>\r\n 1234567 \x00end  "


@pytest.fixture(scope="module")
def trained() -> tokenizers.SentencePieceTokenizer:
    return tokenizers.train_sentencepiece([make_text(i) for i in range(40)], 330)


def test_trained_sentencepiece_loses_nothing(trained: tokenizers.SentencePieceTokenizer) -> None:
    """Guards against normalisation: indentation, unusual characters and special-looking text must come back."""
    assert trained.vocab_size == 330
    for text in (NASTY, " leading", "\n", "", "</s>"):
        ids = trained.encode(text)
        assert trained.eod not in ids
        assert trained.decode([*ids, trained.eod]) == text
    assert trained.encode_batch([NASTY, "the"]) == [trained.encode(NASTY), trained.encode("the")]


def test_training_is_deterministic(trained: tokenizers.SentencePieceTokenizer) -> None:
    """Guards against a resumed preparation whose tokenizer differs from the one that made the first shards."""
    again = tokenizers.train_sentencepiece([make_text(i) for i in range(40)], 330)
    assert again.fingerprint == trained.fingerprint


def test_too_little_text_for_the_vocabulary() -> None:
    """Guards against a tokenizer with fewer pieces than the model has embeddings for."""
    with pytest.raises(TokenizerError, match="vocab_size 4000"):
        tokenizers.train_sentencepiece(["a b"], 4000)
    with pytest.raises(TokenizerError, match="more text"):
        tokenizers.train_sentencepiece([], 300)


def test_save_and_reopen(trained: tokenizers.SentencePieceTokenizer, tmp_path: Path) -> None:
    """Guards against a prepared directory whose tokenizer is another one than that of its tokens."""
    description = json.loads(json.dumps(trained.save(tmp_path)))
    again = tokenizers.reopen_tokenizer(tmp_path, description)
    assert (again.fingerprint, again.eod, again.vocab_size) == (trained.fingerprint, trained.eod, trained.vocab_size)
    model = tmp_path / "sentencepiece.model"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(TokenizerError, match="expected sha256"):
        tokenizers.reopen_tokenizer(tmp_path, description)
    model.unlink()
    with pytest.raises(TokenizerError, match="is missing"):
        tokenizers.reopen_tokenizer(tmp_path, description)


def test_gpt2_ids(shared_data: Path, tmp_path: Path) -> None:
    """Guards against ids that are not GPT-2's: published checkpoints would read noise.

    Some well-known vectors; `test_gpt2_against_the_plain_algorithm` covers the rest.
    """
    gpt2 = tokenizers.load_tokenizer(f"gpt2:{shared_data / 'tokenizer_gpt2'}")
    assert (gpt2.vocab_size, gpt2.eod) == (50257, 50256)
    for text, ids in (
        ("Hello world", [15496, 995]),
        ("Hello, world!", [15496, 11, 995, 0]),
        (" the", [262]),
        ("\n\n", [628]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),  # text in a document, not the end of it
        ("", []),
    ):
        assert gpt2.encode(text) == ids
        assert gpt2.decode(ids) == text
    assert gpt2.decode(gpt2.encode(NASTY)) == NASTY
    again = tokenizers.reopen_tokenizer(tmp_path, gpt2.save(tmp_path))
    assert again.fingerprint == gpt2.fingerprint
    assert again.encode(NASTY) == gpt2.encode(NASTY)
    renamed = tmp_path / "renamed"  # the other pair of names for the same two files
    gpt2.save(renamed)
    assert tokenizers.load_tokenizer(f"gpt2:{renamed}").fingerprint == gpt2.fingerprint


def plain_gpt2(vocab: dict[str, int], merges: list[tuple[str, str]], text: str) -> list[int]:
    """Byte-pair encoding as published: apply the earliest learned merge until none is left, word by word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbol = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    rank = {pair: i for i, pair in enumerate(merges)}
    ids = []
    # \p{L} and \p{N} of the original, in terms of what `re` has.
    words = re.findall(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text)
    for word in words:
        parts = [symbol[b] for b in word.encode()]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            merged, i = [], 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        ids += [vocab[part] for part in parts]
    return ids


def test_gpt2_against_the_plain_algorithm(shared_data: Path) -> None:
    """Guards against ids that differ in rare places: contractions, runs of spaces, bytes outside of ASCII."""
    root = shared_data / "tokenizer_gpt2"
    gpt2 = tokenizers.load_tokenizer(f"gpt2:{root}")
    vocab = json.loads((root / "encoder.json").read_text())
    lines = (root / "vocab.bpe").read_text().split("\n")[1:]
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line)]
    texts = [NASTY, "I'm  here, they'll 've\n\n  x \t y", "a_b __init__(self): 3.14e-10", " " * 9 + "if x:\n" * 3]
    with (shared_data / "pile_domains" / "stackexchange.jsonl").open() as stream:
        texts += [json.loads(line)["text"][:2000] for line, _ in zip(stream, range(20), strict=False)]
    for text in texts:
        assert gpt2.encode(text) == plain_gpt2(vocab, merges, text)


def test_huggingface_json(shared_data: Path) -> None:
    """Guards against special tokens that are read out of, or put into, documents."""
    (path,) = (shared_data / "tokenizer_olmo").glob("*.json")
    olmo = tokenizers.load_tokenizer(f"hf:{path}", eod="<|endoftext|>")
    ids = olmo.encode(NASTY)
    assert olmo.eod not in ids
    assert max(ids) < olmo.vocab_size
    assert olmo.decode(ids) == NASTY
    assert olmo.decode([olmo.eod]) == ""
    with pytest.raises(TokenizerError, match="no such token"):
        tokenizers.load_tokenizer(f"hf:{path}", eod="<nothing>")


def test_sentencepiece_file(shared_data: Path) -> None:
    """Guards against models of others that cannot be loaded, and against an end-of-document id that is made up."""
    path = shared_data / "tokenizer_sentencepiece" / "test_model.model"
    loaded = tokenizers.load_tokenizer(f"sentencepiece:{path}")
    assert (loaded.vocab_size, loaded.eod) == (1000, 2)
    assert loaded.decode(loaded.encode("Hello world")) == "Hello world"
    with pytest.raises(TokenizerError, match="no such piece"):
        tokenizers.load_tokenizer(f"sentencepiece:{path}", eod="<nothing>")


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    """Guards against a library's own traceback where a sentence would help."""
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b c\n")
    for spec, message in (
        ("bpe:x", "expected gpt2:DIR"),
        ("gpt2:", "expected gpt2:DIR"),
        (f"gpt2:{tmp_path / 'none'}", r"encoder\.json \+ vocab\.bpe or vocab\.json"),
        (f"gpt2:{tmp_path}", "not a GPT-2 vocabulary"),
        (f"hf:{tmp_path / 'none.json'}", "is not a file"),
        (f"hf:{tmp_path / 'bad.json'}", r"not a Hugging Face tokenizer\.json"),
        (f"sentencepiece:{tmp_path / 'bad.json'}", "not a SentencePiece model"),
    ):
        with pytest.raises(TokenizerError, match=message):
            tokenizers.load_tokenizer(spec)
