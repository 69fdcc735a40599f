from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import die_at_rename, killed, make_text, run, spec, texts_of, write_jsonl

from megatron_opus.data.manifest import Manifest
from megatron_opus.data.prepare import hub_streams
from megatron_opus.data.prepare.document import SourceError
from megatron_opus.data.prepare.hub_streams import StreamName
from megatron_opus.data.prepare.records import ReadOptions
from megatron_opus.data.prepare.resolve import DatasetSpec

ROWS = 240
EDU = ReadOptions(score_key="score", bucket_key="int_score")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def score(i: int) -> float:
    return 2.5 + (i * 37 % 100) / 40  # 2.5 .. 4.975


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A dataset directory as the hub has them: Parquet files of several row groups, more columns than are read."""
    root = tmp_path / "corpus"
    root.mkdir()
    for part in range(3):
        mine = range(part * 80, part * 80 + 80)
        table = pa.table(
            {
                "text": [make_text(i) for i in mine],
                "id": [f"<urn:{i}>" for i in mine],
                "url": [f"http://x/{i}" for i in mine],
                "score": [score(i) for i in mine],
                "int_score": [round(score(i)) for i in mine],
            }
        )
        pq.write_table(table, root / f"train-{part:05d}.parquet", row_group_size=17)
    return root


def model_of(root: Path) -> dict[str, Any]:
    """A tokenizer made beforehand, so that limits in tokens are counted while fetching."""
    run(root / "model", spec("x", "candidates", write_jsonl(root / "m.jsonl", [make_text(i) for i in range(60)])))
    return {"tokenizer": f"sentencepiece:{root / 'model' / 'tokenizer' / 'sentencepiece.model'}"}


def same_files(one: Path, other: Path) -> None:
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_stream_gives_every_document_once_in_order(hub: Path, tmp_path: Path) -> None:
    """Guards against documents lost or doubled between row groups, files and parts; and against leftovers."""
    for shard_bytes in (900, 10**7):
        out = tmp_path / str(shard_bytes)
        manifest = run(out, spec("web", "candidates", f"hub:{hub}"), shard_bytes=shard_bytes)
        assert texts_of(out, "candidates", "web") == [make_text(i) for i in range(ROWS)]
        (source,) = manifest.datasets[0].sources
        assert (source["path"], source["documents"], source["exhausted"]) == (f"hub:{hub}", ROWS, True)
        assert source["bytes"] == sum(len(make_text(i)) for i in range(ROWS))
        assert not (out / ".work").exists()


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, function: Any) -> None:
    """Run in a process that kills itself before its `at`-th rename."""
    rename = os.replace
    die_at_rename(monkeypatch, at)
    killed(function)
    monkeypatch.setattr(os, "replace", rename)


def test_kill_while_fetching_and_resume(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a resumed fetching that repeats, skips or fetches again what it has."""
    settings = {**model_of(tmp_path), "shard_bytes": 2000}
    web = spec("web", "candidates", f"hub:{hub}")
    run(tmp_path / "whole", web, **settings)
    rows_of = hub_streams._Fetching._rows
    read: list[int] = []

    def counting(self: Any, opened: Any, documents: int) -> Iterator[Any]:
        for row in rows_of(self, opened, documents):
            read.append(documents)
            yield row

    before = []
    for at in (1, 2, 3, 6, 11, 14):
        out = tmp_path / f"killed-{at}"
        interrupted(monkeypatch, at, lambda out=out: run(out, web, **settings))
        markers = sorted((out / ".work").glob("streams/*/part-*.json"))
        before.append(json.loads(markers[-1].read_text())["documents"] if markers else 0)
        read.clear()
        monkeypatch.setattr(hub_streams._Fetching, "_rows", counting)
        run(out, web, **settings)
        monkeypatch.setattr(hub_streams._Fetching, "_rows", rows_of)
        assert len(read) == ROWS - before[-1]
        same_files(out, tmp_path / "whole")
    assert before[0] == 0 < before[2] < before[-1] < ROWS


def test_a_stream_that_breaks_off(hub: Path, tmp_path: Path) -> None:
    """Guards against an answer without the place, and against a resume that does not notice another dataset."""
    settings = {**model_of(tmp_path), "shard_bytes": 2000}
    last = hub / "train-00002.parquet"
    whole = last.read_bytes()
    last.write_bytes(whole[:4] + b"x" * 3000 + whole[3004:])
    stat = last.stat()
    web = spec("web", "candidates", f"hub:{hub}")
    with pytest.raises(SourceError, match=r"the stream broke off after 1[0-9]+ documents .*the same command goes on"):
        run(tmp_path / "out", web, **settings)
    assert list((tmp_path / "out" / ".work").glob("streams/*/part-*.json"))
    last.write_bytes(whole)
    with pytest.raises(SourceError, match="has changed since its fetching began"):
        run(tmp_path / "out", web, **settings)
    os.utime(last, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a network error that went away
    run(tmp_path / "out", web, **settings)
    assert texts_of(tmp_path / "out", "candidates", "web") == [make_text(i) for i in range(ROWS)]


def test_limits_end_the_fetching(hub: Path, tmp_path: Path) -> None:
    """Guards against a whole corpus fetched for a part of it, and datasets larger or much smaller than asked."""
    model = model_of(tmp_path)
    limited = DatasetSpec(name="web", role="candidates", sources=(f"hub:{hub}",), max_documents=20)
    manifest = run(tmp_path / "documents", limited, **model)
    assert texts_of(tmp_path / "documents", "candidates", "web") == [make_text(i) for i in range(20)]
    assert manifest.datasets[0].sources[0]["documents"] == 122, "a tenth and a hundred more than wanted"
    assert not manifest.datasets[0].sources[0]["exhausted"]
    whole = run(tmp_path / "whole", spec("web", "candidates", f"hub:{hub}"), **model).datasets[0].tokens
    for settings in (model, {}):
        tokens = DatasetSpec(name="web", role="candidates", sources=(f"hub:{hub}",), max_tokens=whole // 2)
        out = tmp_path / f"tokens-{len(settings)}"
        entry = run(out, tokens, **settings, shard_bytes=2000).datasets[0]
        if settings:
            assert whole // 2 - 60 < entry.tokens <= whole // 2
            assert 0.5 * ROWS < entry.sources[0]["documents"] < 0.7 * ROWS
    said: list[str] = []
    more = DatasetSpec(name="web", role="candidates", sources=(f"hub:{hub}",), max_documents=110)
    repeated = tmp_path / "repeated"
    repeated.mkdir()
    write_jsonl(repeated / "train.jsonl", [make_text(i % 50) for i in range(400)])
    run(tmp_path / "short", DatasetSpec(**{**vars(more), "sources": (f"hub:{repeated}",)}), **model, log=said.append)
    assert any("50 documents" in line and "less than the limit" in line for line in said)


def test_buckets_share_a_stream(hub: Path, tmp_path: Path) -> None:
    """Guards against a stream fetched once for each bucket, documents in a wrong one, or scores of other documents."""
    import numpy as np

    source = (f"hub:{hub}",)
    specs = [
        DatasetSpec(name=name, role="candidates", sources=source, bucket=bucket, read=EDU)
        for name, bucket in {"edu3": (3.0, 3.0), "edu4_5": (4.0, 5.0)}.items()
    ]
    manifest: Manifest = run(tmp_path / "out", *specs, shard_bytes=2000)
    low, high = manifest.datasets
    assert low.documents + high.documents < ROWS, "2.5 rounds to 2"
    for entry, wanted in ((low, (3,)), (high, (4, 5))):
        mine = [i for i in range(ROWS) if round(score(i)) in wanted]
        assert texts_of(tmp_path / "out", "candidates", entry.name) == [make_text(i) for i in mine]
        kept = np.load(tmp_path / "out" / "candidates" / f"{entry.name}.score.npy")
        np.testing.assert_allclose(kept, [score(i) for i in mine], rtol=1e-6)
        assert entry.scores["key"] == "score"
        assert entry.scores["min"] == pytest.approx(min(score(i) for i in mine), rel=1e-6)


def test_bad_streams_are_named(hub: Path, tmp_path: Path) -> None:
    """Guards against a traceback of a library where a sentence would do, and empty datasets."""
    for source, options, message in (
        ("hub:", {}, "expected hub:NAME"),
        (f"hub:{tmp_path / 'nothing'}", {}, "datasets could not open it"),
        (f"hub:{hub}:test", {}, "datasets could not open it"),
        (f"hub:{hub}", {"text_key": "body"}, "expected a column 'body', found text, id, url, score, int_score"),
        (f"hub:{hub}", {"text_key": "score"}, "expected strings"),
        (f"hub:{hub}", {"score_key": "grade"}, "expected a column 'grade'"),
    ):
        with pytest.raises(SourceError, match=message):
            run(tmp_path / "out", spec("x", "candidates", source), read=ReadOptions(**options))
        assert not (tmp_path / "out" / "manifest.json").exists()
        for path in (tmp_path / "out" / ".work").glob("*.json"):
            path.unlink()
    assert StreamName.parse("hub:a/b@c:d#e") == StreamName(name="a/b", config="c", split="d", revision="e")
    assert StreamName.parse("hub:HuggingFaceFW/fineweb").split == "train"
