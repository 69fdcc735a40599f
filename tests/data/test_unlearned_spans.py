from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import make_text, run, spec
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_models import VOCAB, TinyGPT, token_losses

import megatron_opus
from megatron_opus.backends.engines.losses import sequence_losses
from megatron_opus.backends.formats import indexed
from megatron_opus.config import DataConfig, SelectionConfig
from megatron_opus.data import manifest as manifests
from megatron_opus.data import unlearned_spans
from megatron_opus.data.corpus import Corpus
from megatron_opus.data.manifest import Manifest
from megatron_opus.data.prepare.records import ReadOptions
from megatron_opus.data.prepare.resolve import holdout
from megatron_opus.data.prepare.tokenize import RecordError
from megatron_opus.data.tokenizers import base as tokenizers
from megatron_opus.data.unlearned_spans import MaskError

ROWS = [{"title": f"Title {i} ë😀", "url": f"http://x/{i}", "text": make_text(i)} for i in range(90)]
HEADER = ReadOptions(metadata_template="{title}\n{url}\n\n")


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("masks") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def masked(source: Path) -> Path:
    """Headers on every document of every role, out of many small shards."""
    out = source.parent / "masked"
    both = (
        spec("web", "candidates", source),
        *holdout("goal", (str(write_rows(out.parent / "goal.jsonl", GOAL)),), 0.4),
    )
    run(out, *both, read=HEADER, shard_bytes=1500, workers=1)
    return out


GOAL = [{"title": "Goal", "url": f"u{i}", "text": make_text(500 + i)} for i in range(40)]


def opened(directory: Path, **settings: object) -> Corpus:
    return Corpus.open(directory, DataConfig(**{"seq_length": 24, **settings}), indexed.open_documents)  # type: ignore[arg-type]


def test_headers_are_masked_and_nothing_else_changes(masked: Path, source: Path, tmp_path: Path) -> None:
    """Guards against masks that move by a token or a document, in any role, or that change how text is tokenized."""
    plain = [{"text": f"{row['title']}\n{row['url']}\n\n{row['text']}"} for row in ROWS]
    model = f"sentencepiece:{masked / 'tokenizer' / 'sentencepiece.model'}"
    run(tmp_path / "plain", spec("web", "candidates", write_rows(tmp_path / "p.jsonl", plain)), tokenizer=model)
    for suffix in (".bin", ".idx"):
        same = [d / "candidates" / f"web{suffix}" for d in (masked, tmp_path / "plain")]
        assert same[0].read_bytes() == same[1].read_bytes()
    assert not (tmp_path / "plain" / "candidates" / "web.mask.npy").exists()
    corpus = opened(masked)
    for role, name in (("candidates", "web"), ("proxy", "goal"), ("validation", "goal")):
        documents = indexed.open_documents(name, masked / role / name)
        first = int(corpus.first_ids(role)[0])  # type: ignore[arg-type]
        batch = corpus.batch(np.arange(first, first + int(corpus.sequences(role)[0])))  # type: ignore[arg-type]
        ends = documents.document_ends
        start, expected = 0, []
        for end in ends.tolist():
            ids = documents.tokens(start, end - start).tolist()
            text = corpus.tokenizer.decode(ids)
            header = text[: text.index("\n\n") + 2]
            # A token counts when no character of it lies in the header, and so does the end of the document.
            counts = [len(corpus.tokenizer.decode(ids[: i + 1])) > len(header) for i in range(len(ids) - 1)]
            expected += [*counts, True]
            start = end
        labels = expected[1 : 1 + batch.loss_mask.numel()]
        assert batch.loss_mask.flatten().bool().tolist() == labels
        assert 0 < sum(labels) < len(labels)
    entry = next(e for e in manifests.read(masked).datasets if e.role == "candidates")
    assert entry.mask_spans == 90
    assert len(IndexedDataset(str(masked / "candidates" / "web"))) == 90, "Megatron reads the same files"


def test_masked_tokens_have_no_part_in_losses_and_scores(masked: Path) -> None:
    """Guards against metadata that is learned, or that decides what is selected."""
    corpus = opened(masked, seq_length=48)
    batches = []
    for ids in (np.arange(6), corpus.proxy_ids(0, 6, 0)):
        batch = corpus.batch(ids)
        batches.append(dataclasses.replace(batch, tokens=batch.tokens % VOCAB, labels=batch.labels % VOCAB))
    others = [
        dataclasses.replace(b, labels=torch.where(b.loss_mask == 0, (b.labels + 7) % VOCAB, b.labels)) for b in batches
    ]
    assert all((b.loss_mask == 0).any() for b in batches)
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    signals = [
        megatron_opus.score(model, *pair, optimizer, config=SelectionConfig(score_length=48))
        for pair in (batches, others)
    ]
    assert torch.equal(signals[0].alignment, signals[1].alignment)  # type: ignore[arg-type]
    assert torch.equal(signals[0].interaction, signals[1].interaction)  # type: ignore[arg-type]
    assert torch.equal(signals[0].loss, signals[1].loss)  # type: ignore[arg-type]
    losses = [sequence_losses(token_losses(model, pair[0]), pair[0].loss_mask) for pair in (batches, others)]
    assert torch.equal(*losses)
    seen = dataclasses.replace(others[0], loss_mask=torch.ones_like(others[0].loss_mask))
    assert not torch.equal(sequence_losses(token_losses(model, seen), seen.loss_mask), losses[0])


def test_end_of_document_mask_is_combined(masked: Path) -> None:
    """Guards against one mask taking the place of the other."""
    ids = np.arange(30)
    header, both = opened(masked).batch(ids).loss_mask, opened(masked, eod_mask_loss=True).batch(ids).loss_mask
    ends = opened(masked).batch(ids).tokens == opened(masked).tokenizer.eod
    assert torch.equal(both, torch.where(ends, 0.0, header))
    assert ((header == 1) & ends).sum() + ((header == 0) & ends).sum() == ends.sum() > 0


def test_masks_do_not_depend_on_workers_and_belong_to_the_fingerprint(
    masked: Path, source: Path, tmp_path: Path
) -> None:
    """Guards against masks that differ between shards, and a resume with other masks than before."""
    model = f"sentencepiece:{masked / 'tokenizer' / 'sentencepiece.model'}"
    made: list[Manifest] = []
    for name, settings in {
        "one": {"read": HEADER, "shard_bytes": 10**6},
        "two": {"read": HEADER, "shard_bytes": 900, "workers": 2},
        "title": {"read": ReadOptions(metadata_template="{title}\n")},
    }.items():
        made.append(run(tmp_path / name, spec("web", "candidates", source), tokenizer=model, **settings))
    found = [(tmp_path / name / "candidates" / "web.mask.npy").read_bytes() for name in ("one", "two")]
    assert found[0] == found[1] == (masked / "candidates" / "web.mask.npy").read_bytes()
    assert made[0] == dataclasses.replace(made[1], settings=made[0].settings)
    assert made[0].fingerprint() == made[1].fingerprint() != made[2].fingerprint()
    entry = dataclasses.replace(made[0].datasets[0], mask_sha256="")
    assert dataclasses.replace(made[0], datasets=[entry]).fingerprint() != made[0].fingerprint()


@pytest.mark.parametrize("kind", ["gpt2", "hf", "sentencepiece"])
def test_a_token_that_overlaps_a_span_is_masked(kind: str, shared_data: Path) -> None:
    """Guards against offsets in bytes taken for characters, and tokens across the border that are learned."""
    tokenizer = tokenizers.load_tokenizer(
        {
            "gpt2": f"gpt2:{shared_data / 'tokenizer_gpt2'}",
            "hf": f"hf:{shared_data / 'tokenizer_olmo' / 'allenai_gpt-neox-olmo-dolma-v1_5.json'}",
            "sentencepiece": f"sentencepiece:{shared_data / 'tokenizer_sentencepiece' / 'test_model.model'}",
        }[kind]
    )
    text = "Größe 日本語 😀: hello world, undeniable  tail"
    ids, starts, ends = tokenizer.offsets(text)
    assert ids == tokenizer.encode(text)
    at = text.index("hello")
    for start, end in ((0, at), (at, at + 5), (at + 2, at + 4), (0, len(text)), (text.index("😀"), at), (7, 8)):
        flags = np.zeros(len(ids), dtype=bool)
        for a, b in unlearned_spans.token_spans(starts, ends, [(start, end)]):
            flags[a:b] = True
        for i in range(len(ids)):
            own = set(range(int(starts[i]), int(ends[i])))
            if own & set(range(start, end)):
                assert flags[i]
            elif own:
                assert not flags[i] or min(own) <= end  # only what was dropped in front of it lies in the span
        assert flags.any()
    assert not len(unlearned_spans.token_spans(starts, ends, []))


def test_spans_of_a_key(tmp_path: Path) -> None:
    """Guards against spans that are read in another order, or out of the text, or ignored."""
    text = make_text(3)
    rows = [
        {"text": text, "s": [[5, 9], [0, 2], [8, 12]]},
        {"text": make_text(4), "s": []},
        {"text": make_text(5), "s": None},
    ]
    made = run(
        tmp_path / "out", spec("x", "candidates", write_rows(tmp_path / "a.jsonl", rows)),
        read=ReadOptions(mask_key="s"), vocab_size=282,
    )  # fmt: skip
    assert made.datasets[0].mask_spans == 2, "overlapping spans are one"
    for n, bad in enumerate(([[0, 10**6]], [[3, 1]], [[-1, 2]], [[0]], "0-3", [[0.5, 2]], [["a", "b"]], 7)):
        path = write_rows(tmp_path / f"bad{n}.jsonl", [rows[0], {"text": text, "s": bad}])
        with pytest.raises(RecordError, match=r"bad\d\.jsonl:2: spans: expected \[\[start, end\], \.\.\.\]"):
            run(tmp_path / str(n), spec("x", "candidates", path), read=ReadOptions(mask_key="s"), vocab_size=282)
    with pytest.raises(RecordError, match=r"a\.jsonl:1: no key 'title'"):
        run(tmp_path / "none", spec("x", "candidates", tmp_path / "a.jsonl"), read=HEADER)


def test_damaged_masks_are_named(masked: Path, tmp_path: Path) -> None:
    """Guards against training on metadata because a file is gone or belongs to other tokens."""
    prefix = tmp_path / "web"
    good = np.load(masked / "candidates" / "web.mask.npy")
    tokens = next(e.tokens for e in manifests.read(masked).datasets if e.role == "candidates")
    with pytest.raises(MaskError, match=r"web: .*web\.mask\.npy is missing, without it metadata would be learned"):
        unlearned_spans.open_spans("web", prefix, len(good), tokens)
    for change, message in (
        (good[:-1], r"expected int64 \[90, 2\], found int64 \[89, 2\]"),
        (good.astype(np.int32), "found int32"),
        (good[::-1], "ascending ranges"),
        (good + tokens, "ascending ranges within the"),
    ):
        unlearned_spans.write(prefix, unlearned_spans.SUFFIX, change)
        with pytest.raises(MaskError, match=message):
            unlearned_spans.open_spans("web", prefix, len(good), tokens)
    (tmp_path / "web.mask.npy").write_bytes((masked / "candidates" / "web.mask.npy").read_bytes()[:100])
    with pytest.raises(MaskError, match="is damaged"):
        unlearned_spans.open_spans("web", prefix, len(good), tokens)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    flags=st.lists(st.booleans(), min_size=48, max_size=48),
    dropped=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_spans_follow_their_documents(lengths: list[int], flags: list[bool], dropped: list[bool]) -> None:
    """Guards against masks that stay behind when a document in front of them is dropped."""
    total = sum(lengths)
    starts = np.cumsum(lengths) - lengths
    flag = np.array(flags[:total])
    flag[starts + np.array(lengths) - 1] = False  # the end of a document is never metadata
    keep = ~np.array(dropped[: len(lengths)])
    expected = np.concatenate(
        [flag[s : s + n] for s, n, k in zip(starts, lengths, keep, strict=True) if k] or [flag[:0]]
    )
    spans = unlearned_spans.without_documents(unlearned_spans.ranges(flag), np.array(lengths), keep)
    twice = unlearned_spans.joined([spans, spans], [len(expected)] * 2)
    both = np.concatenate([expected, expected])
    assert unlearned_spans.within(twice, 0, len(both)).tolist() == both.tolist()
    for start in range(len(both)):
        assert unlearned_spans.within(twice, start, len(both) - start).tolist() == both[start:].tolist()
