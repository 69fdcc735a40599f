from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import StreamOfNumbers, make_text

from megatron_opus.backends.formats import indexed
from megatron_opus.config import DataConfig
from megatron_opus.data import manifest as manifests
from megatron_opus.data.corpus import Corpus, CorpusError
from megatron_opus.data.manifest import DatasetEntry, Manifest, ManifestError
from megatron_opus.data.tokenizers.base import TokenizerError


def numbers(candidates: dict[str, tuple[int, tuple[int, ...]]], **settings: Any) -> Corpus:
    """A corpus of StreamOfNumbers domains: name -> (tokens, document ends)."""
    entries = [
        DatasetEntry(
            name=name,
            role="candidates",
            prefix=name,
            dtype="int32",
            documents=len(ends) + 1,
            tokens=n,
            bin_bytes=4 * n,
            bin_sha256=name,
            idx_sha256=name,
            sources=[],
        )
        for name, (n, ends) in candidates.items()
    ]
    manifest = Manifest(tokenizer={"fingerprint": "t"}, datasets=entries, settings={})
    streams = {("candidates", name): StreamOfNumbers(name, n, ends) for name, (n, ends) in candidates.items()}
    config = DataConfig(**{"seq_length": 4, **settings})
    return Corpus(manifest, streams, None, config)  # type: ignore[arg-type]


def test_labels_are_shifted_once(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against labels shifted twice, the model then predicting token t+2 (defect 1 of the reference)."""
    batch = numbers({"a": (100, ())}).batch([0, 3])
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]
    assert batch.labels.tolist() == [[1, 2, 3, 4], [13, 14, 15, 16]]
    real = open_corpus().batch(np.arange(5))
    assert torch.equal(real.labels[:, :-1], real.tokens[:, 1:])
    assert torch.equal(real.labels[:-1, -1], real.tokens[1:, 0]), "the last label is the next sequence's first token"
    for x in (real.tokens, real.labels, real.position_ids):
        assert x.dtype == torch.int64
        assert x.is_contiguous()
    assert real.loss_mask.dtype == torch.float32
    assert real.document_ids is None


def test_ids_are_offsets_into_domains() -> None:
    """Guards against ids that name another sequence in another process, or a sequence across two domains."""
    corpus = numbers({"a": (9, ()), "b": (13, ())})
    assert corpus.sequences("candidates").tolist() == [2, 3]  # the last token is only ever a label
    assert corpus.first_ids("candidates").tolist() == [0, 2]
    assert corpus.batch([4]).tokens.tolist() == [[8, 9, 10, 11]]
    assert (corpus.describe(4).domain, corpus.describe(4).index, corpus.describe(4).start) == ("b", 2, 8)
    assert corpus.describe(1).domain == "a"
    for bad in (-1, 5):
        with pytest.raises(CorpusError, match=r"expected 0\.\.4"):
            corpus.batch([bad])


def test_document_boundaries() -> None:
    """Guards against masks, positions or attention that cross (or miss) the end of a document.

    Tokens 0..7 with documents [0, 3), [3, 4), [4, 20): token 2 and token 3 are the last of theirs.
    """
    corpus = numbers(
        {"a": (20, (3, 4))},
        seq_length=8,
        reset_attention_mask=True,
        reset_position_ids=True,
        eod_mask_loss=True,
    )
    batch = corpus.batch([0, 1])
    assert batch.document_ids is not None
    assert batch.document_ids.dtype == torch.int32
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2], [0] * 8]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3], list(range(8))]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0, 1, 1, 1, 1], [1] * 8]
    info = corpus.describe(0)
    assert (info.first_document, info.last_document) == (0, 2)


def test_boundary_at_the_edge_of_a_sequence() -> None:
    """Guards against off-by-one errors where a document ends with, or begins with, a sequence."""
    corpus = numbers({"a": (9, (4,))}, reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
    batch = corpus.batch([0, 1])
    assert batch.document_ids is not None
    assert batch.loss_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.document_ids.tolist() == [[0] * 4, [0] * 4]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert corpus.describe(0).last_document == 0
    assert corpus.describe(1).first_document == 1


def test_flags_off_ignore_boundaries() -> None:
    """Guards against a mask that is applied although the recipe does not ask for it."""
    batch = numbers({"a": (9, (2,))}).batch([0])
    assert batch.document_ids is None
    assert batch.loss_mask.tolist() == [[1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]]


def test_fingerprint_changes_with_what_ids_mean(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against a checkpoint resumed on data that ids do not fit, and against a needless refusal."""
    base = open_corpus()
    assert open_corpus().fingerprint == base.fingerprint
    assert open_corpus(unselected="return").fingerprint == base.fingerprint
    for change in (
        {"seq_length": 17},
        {"reset_attention_mask": True},
        {"reset_position_ids": True},
        {"eod_mask_loss": True},
    ):
        assert open_corpus(**change).fingerprint != base.fingerprint


def test_proxy_pool(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against proxy draws that repeat before the pool is used up, or that a resumed run draws differently."""
    corpus = open_corpus()
    (size,) = corpus.sequences("proxy").tolist()
    (first,) = corpus.first_ids("proxy").tolist()
    turns = size // 5
    draws = [corpus.proxy_ids(step, 5, seed=3) for step in range(2 * turns)]
    for epoch in (draws[:turns], draws[turns:]):
        seen = np.concatenate(epoch)
        assert len(set(seen.tolist())) == 5 * turns
        assert seen.min() >= first
        assert seen.max() < first + size
    assert not np.array_equal(np.concatenate(draws[:turns]), np.concatenate(draws[turns:]))
    assert np.array_equal(open_corpus().proxy_ids(turns + 1, 5, seed=3), draws[turns + 1])
    assert not np.array_equal(corpus.proxy_ids(0, 5, seed=4), draws[0])
    assert {corpus.describe(int(i)).role for i in draws[0]} == {"proxy"}
    with pytest.raises(CorpusError, match="proxy_batch_size: expected 1"):
        corpus.proxy_ids(0, size + 1, seed=3)
    with pytest.raises(CorpusError, match="proxy"):
        numbers({"a": (9, ())}).proxy_ids(0, 1, seed=0)


def test_validation_is_fixed(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against validation losses that are not comparable between steps or runs."""
    corpus = open_corpus()
    ids = corpus.validation_ids("goal", 4)
    assert np.array_equal(ids, corpus.validation_ids("goal", 6)[:4])
    assert {corpus.describe(int(i)).role for i in ids} == {"validation"}
    assert len(corpus.validation_ids("goal", 10**6)) == corpus.sequences("validation")[0]
    with pytest.raises(CorpusError, match="there are goal"):
        corpus.validation_ids("gaol", 4)


def test_proxies_have_the_length_that_is_scored(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against eleven twelfths of the proxy's text that are never read, where scoring looks at 512 tokens of
    6,144; against validation sequences cut with them; and against a resume on other proxies."""
    long, short = open_corpus(), open_corpus(proxy_length=4)
    assert short.fingerprint != long.fingerprint
    assert open_corpus(proxy_length=16).fingerprint == long.fingerprint
    tokens = long.sequences("proxy")[0] * 16
    assert 0 <= short.sequences("proxy")[0] * 4 - tokens < 16
    for role in ("candidates", "validation"):
        assert short.sequences(role).tolist() == long.sequences(role).tolist()
    first = int(long.first_ids("proxy")[0])
    whole, pieces = long.batch([first]), short.batch(range(first, first + 4))
    assert pieces.tokens.shape == (4, 4)
    for name in ("tokens", "labels", "loss_mask"):
        assert torch.equal(getattr(pieces, name).reshape(1, 16), getattr(whole, name))
    info = short.describe(first + 1)
    assert (info.start, info.stop) == (4, 8)
    assert short.text(first + 1) == long.tokenizer.decode(whole.tokens[0, 4:8].tolist())
    validation = [int(c.first_ids("validation")[0]) for c in (long, short)]
    assert torch.equal(long.batch(validation[:1]).tokens, short.batch(validation[1:]).tokens)
    with pytest.raises(CorpusError, match=r"one length, got some of \[4, 16\] tokens"):
        short.batch([0, first])


def test_text_of_a_sequence(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against an id that cannot be traced back to what the model saw."""
    corpus = open_corpus(seq_length=600)
    text = corpus.text(0)
    end = text.index(")\n\n")
    assert text[:end].split(" (")[0] == make_text(int(text[:end].split(" (")[1])).split(" (")[0]
    assert "\ufffd" not in corpus.text(0)


def test_domain_without_a_sequence(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against a domain that is silently never drawn because it is shorter than a sequence."""
    with pytest.raises(CorpusError, match=r"domain c .*data\.seq_length=3000"):
        open_corpus(seq_length=3000)
    assert numbers({"a": (5, ())}).num_sequences == 1
    with pytest.raises(CorpusError, match="one takes 5"):
        numbers({"a": (4, ())})


def test_damaged_directories(prepared: Path, tmp_path: Path) -> None:
    """Guards against training on files that are not those of the manifest."""
    config = DataConfig(seq_length=16)
    with pytest.raises(ManifestError, match="not found"):
        Corpus.open(tmp_path / "nothing", config, indexed.open_documents)
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    model = copy / "tokenizer" / "sentencepiece.model"
    model.write_bytes(model.read_bytes() + b"x")
    with pytest.raises(TokenizerError, match="expected sha256"):
        Corpus.open(copy, config, indexed.open_documents)
    shutil.copytree(prepared / "tokenizer", copy / "tokenizer", dirs_exist_ok=True)
    for suffix in (".bin", ".idx"):
        shutil.copy(copy / f"candidates/b{suffix}", copy / f"candidates/a{suffix}")
    with pytest.raises(CorpusError, match=r"domain a .*by the manifest"):
        Corpus.open(copy, config, indexed.open_documents)
    data = json.loads((copy / manifests.FILE_NAME).read_text())
    for change, message in (({"version": 99}, "expected version 1, found 99"), ({"format": "x"}, "another kind")):
        (copy / manifests.FILE_NAME).write_text(json.dumps({**data, **change}))
        with pytest.raises(ManifestError, match=message):
            Corpus.open(copy, config, indexed.open_documents)
