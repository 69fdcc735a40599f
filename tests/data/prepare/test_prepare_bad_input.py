from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_text, run, spec, texts_of, write_jsonl

from megatron_opus.data.prepare import worker
from megatron_opus.data.prepare.records import ReadOptions, SourceError
from megatron_opus.data.prepare.resolve import PrepareError, holdout
from megatron_opus.data.prepare.tokenize import RecordError

BAD_LINES = {
    b'{"text": "cut off': "broken JSON",
    b'{"body": "x"}': r"no key 'text' \(keys: body\)",
    b'{"text": 3}': "expected a string, got int",
    b'{"text": null}': "expected a string, got NoneType",
    b'["text"]': "expected a JSON object, got list",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\\ud800"}': "lone surrogate",
    b"[" * 100_000: "broken JSON",
}


@pytest.mark.parametrize(
    ("bad", "workers"),
    [*((bad, 1) for bad in BAD_LINES), (next(iter(BAD_LINES)), 2)],
    ids=lambda value: value[:18].decode("latin-1") if isinstance(value, bytes) else str(value),
)
def test_malformed_records_are_named(tmp_path: Path, bad: bytes, workers: int) -> None:
    """Guards against bad records that are skipped in silence, or an error that does not say where."""
    good = [json.dumps({"text": make_text(i)}).encode() for i in range(40)]
    lines = [*good[:30], b"", bad, *good[30:]]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(RecordError, match=rf"bad\.jsonl:32: .*{BAD_LINES[bad]}"):
        run(tmp_path / "stop", spec("x", "candidates", path), shard_bytes=1000, workers=workers)
    said: list[str] = []
    out = tmp_path / "skip"
    manifest = run(
        out, spec("x", "candidates", path), shard_bytes=1000, on_error="skip", workers=workers, log=said.append
    )
    (entry,) = manifest.datasets
    assert (entry.documents, entry.skipped) == (40, 1)
    assert [(r["file"], r["line"]) for r in entry.skipped_records] == [(str(path), 32)]
    assert any(f"{path}:32" in line for line in said)


def test_a_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against waiting for ever for a process that the system killed (memory, most often)."""
    path = write_jsonl(tmp_path / "a.jsonl", [make_text(i) for i in range(40)])
    monkeypatch.setattr(
        worker,
        "_start",
        lambda: subprocess.Popen(
            [sys.executable, "-c", "import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 9)"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ),
    )
    with pytest.raises(worker.WorkerError, match=r"code -9 \(killed: out of memory\?\) at .*a\.jsonl"):
        run(tmp_path / "out", spec("x", "candidates", path), shard_bytes=1000, workers=2)
    monkeypatch.undo()
    assert run(tmp_path / "out", spec("x", "candidates", path), shard_bytes=1000, workers=2).datasets[0].documents == 40


def test_malformed_text_and_parquet(tmp_path: Path) -> None:
    """Guards against the other formats being less strict than .jsonl."""
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo\n\xff\xfe\n")  # the line is that of the first bad byte
    with pytest.raises(RecordError, match=r"bad\.txt:3: invalid UTF-8"):
        run(tmp_path / "a", spec("x", "candidates", tmp_path / "bad.txt"))
    with pytest.raises(RecordError, match=r"bad\.txt:3: invalid UTF-8"):
        run(tmp_path / "b", spec("x", "candidates", tmp_path / "bad.txt"), read=ReadOptions(txt_documents="line"))
    rows = [make_text(i) for i in range(10)]
    pq.write_table(pa.table({"text": [*rows, None]}), tmp_path / "bad.parquet", row_group_size=3)
    with pytest.raises(RecordError, match=r"bad\.parquet:11: 'text': expected a string, got NoneType"):
        run(tmp_path / "c", spec("x", "candidates", tmp_path / "bad.parquet"), shard_bytes=1)
    manifest = run(
        tmp_path / "d", spec("x", "candidates", tmp_path / "bad.parquet"), shard_bytes=1, on_error="skip",
        vocab_size=290,
    )  # fmt: skip
    assert (manifest.datasets[0].documents, manifest.datasets[0].skipped) == (10, 1)


def test_sources_are_checked_before_any_work(tmp_path: Path) -> None:
    """Guards against an hour of tokenizing before a mistyped name is found."""
    good = write_jsonl(tmp_path / "good.jsonl", [make_text(0)])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "data.csv").write_text("x")
    (tmp_path / "none").mkdir()
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.jsonl").write_bytes(good.read_bytes())
    (tmp_path / "both" / "README.txt").write_text("licence")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "number.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    (tmp_path / "fake.parquet").write_bytes(b"x" * 100)
    for name, message in (
        ("missing.jsonl", "no such file"),
        ("*.json", "no such file"),
        ("empty.jsonl", "is empty"),
        ("data.csv", r"expected a \.jsonl, \.txt, \.parquet, .* file, got suffix '\.csv'"),
        ("none", "file in this directory"),
        ("both", r"holds \.jsonl, \.txt files"),
        ("other.parquet", "expected a column 'text', found body"),
        ("number.parquet", "expected strings, found int64"),
        ("rows.parquet", "no rows"),
        ("fake.parquet", "not a Parquet file"),
    ):
        with pytest.raises((PrepareError, SourceError), match=message):
            run(tmp_path / "out", spec("x", "candidates", tmp_path / name))
        assert not (tmp_path / "out" / ".work").exists()
    for datasets, message in (
        ((), "at least one dataset of candidates"),
        ((spec("x", "proxy", good),), "at least one dataset of candidates"),
        ((spec("a/b", "candidates", good),), "expected letters"),
        ((spec("..", "candidates", good),), "expected letters"),
        ((spec("a" * 201, "candidates", good),), "at most 200"),
        ((replace(spec("x", "candidates", good), read=ReadOptions(text_key="")),), "expected a key or column of the"),
        ((spec("x", "candidates", good), spec("x", "candidates", good)), "given twice as candidates"),
        ((spec("x", "candidates", good, tmp_path / "go*.jsonl"),), "is given twice"),
    ):
        with pytest.raises(PrepareError, match=message):
            run(tmp_path / "out2", *datasets, vocab_size=280)
    with pytest.raises(PrepareError, match="between 0 and 1"):
        holdout("x", (str(good),), 1.0)


def test_nothing_left(tmp_path: Path) -> None:
    """Guards against an empty dataset where everything was held out, or one document cannot be split."""
    one, two = (write_jsonl(tmp_path / f"{i}.jsonl", [make_text(i) for i in range(3 * i)]) for i in (1, 2))
    run(tmp_path / "first", spec("x", "candidates", two), vocab_size=280)
    model = {"tokenizer": f"sentencepiece:{tmp_path / 'first' / 'tokenizer' / 'sentencepiece.model'}"}
    with pytest.raises(PrepareError, match=r"x \(candidates\): no document is left \(3 held out, 0 empty"):
        run(tmp_path / "out", spec("x", "candidates", one), spec("y", "validation", two), **model)
    single = write_jsonl(tmp_path / "single.jsonl", [make_text(99)])
    with pytest.raises(PrepareError, match="another --holdout"):
        run(tmp_path / "out2", spec("x", "candidates", one), *holdout("y", (str(single),), 0.5), **model)


def test_txt_documents_and_line_ends(tmp_path: Path) -> None:
    """Guards against byte-order marks, Windows line ends or a missing last newline changing the documents."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\nthree\n\n\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "b one"}\r\n\r\n{"text": "b two"}')
    both = spec("x", "candidates", tmp_path / "a.txt", tmp_path / "b.jsonl")
    expected = {
        "file": ["one\r\n\r\ntwo\r\nthree\n\n\n"],
        "paragraph": ["one", "two\r\nthree"],
        "line": ["one", "two", "three"],
    }
    for kind, texts in expected.items():
        run(tmp_path / kind, both, read=ReadOptions(txt_documents=kind), vocab_size=272)  # type: ignore[arg-type]
        assert texts_of(tmp_path / kind, "candidates", "x") == [*texts, "b one", "b two"]


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    """Guards against documents that are nothing but an end of document."""
    path = write_jsonl(tmp_path / "a.jsonl", ["", "  \n", make_text(1)])
    manifest = run(tmp_path / "out", spec("x", "candidates", path), vocab_size=280)
    assert (manifest.datasets[0].documents, manifest.datasets[0].empty) == (1, 2)


def test_a_datasets_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against `datasets:` sources that are read in another order, or not from where they were planned."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "local" / "train.jsonl", [make_text(i) for i in range(30)])
    out = tmp_path / "out"
    manifest = run(out, spec("x", "candidates", f"datasets:{tmp_path / 'local'}"), vocab_size=290)
    assert texts_of(out, "candidates", "x") == [make_text(i) for i in range(30)]
    assert "fingerprint" in manifest.datasets[0].sources[0]
    with pytest.raises(SourceError, match="expected a column 'body'"):
        run(
            tmp_path / "out2", spec("x", "candidates", f"datasets:{tmp_path / 'local'}"),
            read=ReadOptions(text_key="body"),
        )  # fmt: skip
    with pytest.raises(SourceError, match="datasets could not load it"):
        run(tmp_path / "out3", spec("x", "candidates", f"datasets:{tmp_path / 'nothing'}"))
