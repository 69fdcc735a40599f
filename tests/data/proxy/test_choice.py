"""Which documents of the finished pieces stay: duplicates, limits, compressed and damaged sources, presets."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_text, run, spec, texts_of, write_jsonl

from megatron_opus.data.prepare.document import SourceError
from megatron_opus.data.prepare.presets import Request, datasets_of, general_read
from megatron_opus.data.prepare.records import ReadOptions
from megatron_opus.data.prepare.resolve import DatasetSpec, PrepareError
from megatron_opus.data.prepare.tokenize import RecordError


def test_duplicates_are_dropped_once_per_role(tmp_path: Path) -> None:
    """Guards against a text that is offered twice, in one domain or in two, or lost altogether."""
    a = write_jsonl(
        tmp_path / "a.jsonl", [make_text(i) for i in (1, 2, 1, 3, 2, 1)] + [make_text(3).replace(" ", "\n ")]
    )
    b = write_jsonl(tmp_path / "b.jsonl", [make_text(i) for i in (3, 4, 5, 4)])
    both = (spec("a", "candidates", a), spec("b", "candidates", b))
    for workers, shard_bytes in ((1, 10**6), (2, 300)):
        out = tmp_path / f"drop-{workers}"
        manifest = run(out, *both, workers=workers, shard_bytes=shard_bytes, vocab_size=290)
        assert texts_of(out, "candidates", "a") == [make_text(i) for i in (1, 2, 3)]
        assert texts_of(out, "candidates", "b") == [make_text(i) for i in (4, 5)]
        assert [e.duplicates for e in manifest.datasets] == [4, 2], "whitespace makes no other text"
    kept = run(tmp_path / "keep", *both, duplicates="keep", vocab_size=290)
    assert [(e.documents, e.duplicates) for e in kept.datasets] == [(7, 0), (4, 0)]
    with pytest.raises(PrepareError, match=r"b \(candidates\): no document is left .* 7 duplicates"):
        run(tmp_path / "none", spec("a", "candidates", a), spec("b", "candidates", a), vocab_size=290)


def test_limits_do_not_depend_on_shards_or_workers(tmp_path: Path) -> None:
    """Guards against limits that count what is dropped, or that another machine would put elsewhere."""
    texts = [make_text(i // 2) for i in range(120)]  # every text twice
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    base = spec("a", "candidates", source)
    run(tmp_path / "model", base)
    model = f"sentencepiece:{tmp_path / 'model' / 'tokenizer' / 'sentencepiece.model'}"
    made = []
    for workers, shard_bytes in ((1, 10**6), (1, 700), (3, 700)):
        out = tmp_path / f"{workers}-{shard_bytes}"
        made.append(
            run(out, replace(base, max_documents=25), tokenizer=model, workers=workers, shard_bytes=shard_bytes)
        )
        assert texts_of(out, "candidates", "a") == [make_text(i) for i in range(25)]
    assert made[1].datasets == made[2].datasets, "the counts too"
    some = made[0].datasets[0].tokens
    for limit, documents in ((some, 25), (some - 1, 24), (10**9, 60)):
        out = tmp_path / f"tokens-{limit}"
        entry = run(out, replace(base, max_tokens=limit), tokenizer=model, shard_bytes=700).datasets[0]
        assert (entry.documents, entry.tokens <= limit) == (documents, True)
    rest = DatasetSpec(name="b", role="candidates", sources=(str(source),), max_documents=10)
    run(tmp_path / "two", replace(base, max_documents=25), rest, tokenizer=model, shard_bytes=700)
    assert texts_of(tmp_path / "two", "candidates", "b") == [make_text(i) for i in range(25, 35)], "what the first left"
    with pytest.raises(PrepareError, match="expected a limit of at least 1, got 0"):
        run(tmp_path / "zero", replace(base, max_tokens=0))


def test_compressed_files(tmp_path: Path) -> None:
    """Guards against archives that are read half, and errors that do not say which file is cut off where."""
    texts = [make_text(i) for i in range(200)]
    plain = write_jsonl(tmp_path / "plain.jsonl", texts).read_bytes()
    zst = pa.compress(plain[:9000], codec="zstd", asbytes=True) + pa.compress(plain[9000:], codec="zstd", asbytes=True)
    packed = {"gz": gzip.compress(plain[:9000]) + gzip.compress(plain[9000:]), "zst": zst}
    for suffix, data in packed.items():
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(data)
        run(tmp_path / suffix, spec("x", "candidates", path), shard_bytes=500)
        assert texts_of(tmp_path / suffix, "candidates", "x") == texts
        for n, bad in enumerate(
            (data[: len(data) - 40], b"not an archive at all", data[:400] + b"\0" * 30 + data[430:])
        ):
            path.write_bytes(bad)
            for workers in (1, 2):
                # A hole may give text that is no JSON before the archive's checksum is reached.
                error = (SourceError, RecordError) if n == 2 else SourceError
                where = r":\d+: broken JSON|: damaged" if n == 2 else r": damaged or truncated after line \d+"
                with pytest.raises(error, match=rf"a\.jsonl\.{suffix}({where})"):
                    run(
                        tmp_path / f"{suffix}-{n}-{workers}",
                        spec("x", "candidates", path, tmp_path / "plain.jsonl"),
                        workers=workers,
                    )
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "one.jsonl.gz").write_bytes(packed["gz"])
    run(tmp_path / "out", spec("x", "candidates", folder))
    assert len(texts_of(tmp_path / "out", "candidates", "x")) == 200


@pytest.mark.parametrize("workers", [1, 2])
def test_truncated_parquet(tmp_path: Path, workers: int) -> None:
    """Guards against a traceback from a worker, or fewer documents without a word, where a file is damaged inside."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [make_text(i) for i in range(300)]}), path, row_group_size=50, compression="none")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"a\.parquet: not a Parquet file, or a truncated one"):
        run(tmp_path / "cut", spec("x", "candidates", path), workers=workers)
    half = len(whole) // 2
    path.write_bytes(whole[:half] + b"\xff" * 4000 + whole[half + 4000 :])
    good = write_jsonl(tmp_path / "b.jsonl", [make_text(1000)])
    run(tmp_path / "model", spec("x", "candidates", good), vocab_size=280)
    with pytest.raises(SourceError, match=r"a\.parquet: damaged after row \d+ of the row groups"):
        run(
            tmp_path / "hole", spec("x", "candidates", good, path), workers=workers, shard_bytes=2000,
            tokenizer=f"sentencepiece:{tmp_path / 'model' / 'tokenizer' / 'sentencepiece.model'}",
        )  # fmt: skip


def test_requests(tmp_path: Path) -> None:
    """Guards against options that are accepted and belong to another dataset, or to none."""
    request = Request(
        sources={"candidates": ["web=a.jsonl", "web=b.jsonl"], "target": ["goal=g.jsonl"]},
        presets=["fineweb-edu", "sciencepedia=sci/*.parquet"],
        candidates_holdout=0.01,
        read={"text_key": ["sciencepedia=content"], "metadata_template": ["{title}\n", "web={url}\n"], "score_key": []},
        max_tokens=["30B", "goal=2M"],
        max_documents=["edu3=1000"],
        buckets=["web=1:2.5"],
    )
    found = {(s.role, s.name): s for s in datasets_of(request)}
    assert next(iter(found)) == ("candidates", "web")
    assert found["candidates", "web"].sources == ("a.jsonl", "b.jsonl")
    assert found["candidates", "web"].bucket == (1.0, 2.5)
    assert found["candidates", "web"].read == ReadOptions(metadata_template="{url}\n")
    edu = found["candidates", "edu4_5"]
    assert edu.sources == ("hub:HuggingFaceFW/fineweb-edu@sample-10BT:train",)
    assert (edu.bucket, edu.max_tokens, edu.max_documents) == ((4, 5), 30 * 10**9, None)
    assert edu.read == ReadOptions(metadata_template="{title}\n", score_key="score", bucket_key="int_score")
    assert found["candidates", "edu3"].max_documents == 1000
    science = found["candidates", "sciencepedia"]
    assert science.read == ReadOptions(text_key="content", metadata_template="{title}\n")
    assert (science.keep, found["validation", "sciencepedia"].keep) == ((0.01, 1.0), (0.0, 0.01))
    assert found["validation", "edu3"].bucket == (3, 3)
    assert found["validation", "edu3"].max_tokens is None
    assert (found["proxy", "goal"].max_tokens, found["proxy", "goal"].read) == (2 * 10**6, None)
    assert general_read(request, list(found.values())) == ReadOptions(metadata_template="{title}\n")
    plain = Request(sources={"candidates": ["web=a.jsonl"]}, read={})
    for change, message in (
        ({"presets": ["fineweb2"]}, "expected one of fineweb, fineweb-edu, sciencepedia"),
        ({"presets": ["sciencepedia"]}, "where it is published is not known here"),
        ({"presets": ["fineweb", "fineweb=x.parquet"]}, "given twice"),
        ({"max_tokens": ["many"]}, "expected a number of at least 1"),
        ({"max_tokens": ["wbe=1B"]}, "no dataset 'wbe'; there are web"),
        ({"read": {"metadata_template": ["wbe={url}"]}}, "no dataset 'wbe'; there are web"),
        ({"max_tokens": ["1B", "2B"]}, "given twice for every dataset"),
        ({"buckets": ["3:5"]}, "expected NAME=LOW:HIGH"),
        ({"buckets": ["web=5:3"]}, "expected LOW <= HIGH"),
        ({"read": {"mask_key": ["web=a", "web=b"]}}, "given twice for web"),
    ):
        with pytest.raises(PrepareError, match=message):
            datasets_of(replace(plain, **change))  # type: ignore[arg-type]
    path = write_jsonl(tmp_path / "a.jsonl", [make_text(1)])
    with pytest.raises(PrepareError, match="a bucket needs a score"):
        run(tmp_path / "out", replace(spec("x", "candidates", path), bucket=(1.0, 2.0)))
    for template, message in (
        ("{title", "expected '}'"),
        ("{}", "expected a key in braces"),
        ("{a.b}", "expected a key"),
        ("{title:>9999999999}", "expected a key"),  # a format takes as much memory as it says
        ("{title!r}", "expected a key"),
    ):
        with pytest.raises(SourceError, match=message):
            run(tmp_path / "out", spec("x", "candidates", path), read=ReadOptions(metadata_template=template))
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(SourceError, match=r"a \.txt file has no keys"):
        run(tmp_path / "out", spec("x", "candidates", tmp_path / "a.txt"), read=ReadOptions(mask_key="m"))
