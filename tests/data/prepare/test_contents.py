"""What is in the files: tokenizers that lose text, tables of other types, long windows, folders with more than data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_text, run, spec, write_jsonl
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron_opus.data.prepare.compressed import numbered_lines
from megatron_opus.data.prepare.directories import data_files
from megatron_opus.data.prepare.records import ReadOptions, SourceError, plan_shards, read_shard
from megatron_opus.data.prepare.tokenize import RecordError
from megatron_opus.data.tokenizers.base import TokenizerError, load_tokenizer

END = "<|endoftext|>"


def letters(path: Path, *, special: bool) -> Path:
    """Write a tokenizer of the ASCII letters and the space alone, without an unknown token."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_tokens([AddedToken(END, special=special, normalized=False)])
    tokenizer.save(str(path))
    return path


def test_no_text_ends_a_document(tmp_path: Path) -> None:
    """Guards against a document that is cut where somebody typed the name of the end-of-document token."""
    load_tokenizer(f"hf:{letters(tmp_path / 'good.json', special=True)}")
    bad = letters(tmp_path / "bad.json", special=False)
    with pytest.raises(TokenizerError, match=r"gives token 27.*special"):
        load_tokenizer(f"hf:{bad}")
    with pytest.raises(TokenizerError, match="gives token 4"):  # an ordinary letter ends no document
        load_tokenizer(f"hf:{bad}", "e")


def test_an_end_that_only_a_document_shows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against ends of document inside of documents where the trial at the start has missed them."""
    monkeypatch.setattr("megatron_opus.data.tokenizers.base.Tokenizer.refuse_eod_in_text", lambda self: None)
    path = write_jsonl(tmp_path / "a.jsonl", ["plain words", f"typed {END} here"])
    with pytest.raises(RecordError, match=r"a\.jsonl:2: the text itself gives .*id 27"):
        run(
            tmp_path / "out",
            spec("x", "candidates", path),
            tokenizer=f"hf:{letters(tmp_path / 't.json', special=False)}",
        )


def test_lost_characters_are_counted_and_said(tmp_path: Path) -> None:
    """Guards against a tokenizer that drops characters without a word, and documents of nothing but their end."""
    path = write_jsonl(tmp_path / "a.jsonl", ["你好世界", "na你ve caf你 ok", "plain words"])
    said: list[str] = []
    tokenizer = f"hf:{letters(tmp_path / 't.json', special=True)}"
    (entry,) = run(tmp_path / "out", spec("x", "candidates", path), tokenizer=tokenizer, log=said.append).datasets
    assert (entry.documents, entry.empty) == (2, 1)
    assert (entry.probed_characters, entry.lost_characters) == (4 + 13 + 11, 6)
    assert entry.most_lost == {"你": 3, "好": 1, "世": 1, "界": 1}
    assert any("loses 6 of the 28 characters" in line and "'你' 3" in line for line in said)
    said.clear()
    path = write_jsonl(tmp_path / "b.jsonl", ["你好世界 and words", "plain words"])  # bytes as a fallback lose nothing
    (entry,) = run(tmp_path / "out2", spec("x", "candidates", path), log=said.append).datasets
    assert (entry.lost_characters, entry.probed_characters) == (0, 25)
    assert not any("loses" in line for line in said)


def read(path: Path) -> list[str | None]:
    options = ReadOptions()
    return [r.text for s in plan_shards(str(path), 1 << 20, options) for r in read_shard(s, options)]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_text_type_of_parquet_is_read(tmp_path: Path, kind: str) -> None:
    """Guards against 'expected strings' for what is text: polars writes string_view, pandas categories dictionaries."""
    of = {"dictionary": pa.dictionary(pa.int32(), pa.string())}
    texts = ["a one", "a two", "a one"]
    column = pa.array(texts).cast(of.get(kind) or getattr(pa, kind)())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == texts


def test_a_text_given_twice_is_refused(tmp_path: Path) -> None:
    """Guards against a KeyError of the library, and against one of two texts that is dropped in silence."""
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: expected one column 'text', found 2"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n{"text": "c", "other": {"text": 1, "text": 2}}\n')
    options = ReadOptions()
    (shard,) = plan_shards(str(tmp_path / "a.jsonl"), 1 << 20, options)
    first, second = read_shard(shard, options)
    assert first.text is None
    assert first.problem == "key 'text' is given more than once"
    assert second.text == "c"


def test_long_windows_of_zstd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against 'damaged, restore it' for a file that `zstd --long=28` or `--long=31` packed well."""
    lines = "".join(json.dumps({"text": f"Line number {i}"}) + "\n" for i in range(40))
    for power in (28, 31):
        path = tmp_path / f"long{power}.jsonl.zst"
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(lines.encode())
        raw = bytearray(path.read_bytes())
        assert not raw[4] & 0x20, "the frame header has a window"
        raw[5] = (power - 10) << 3
        path.write_bytes(raw)
        if shutil.which("zstd"):
            assert len(list(numbered_lines(str(path)))) == 40
            assert read(path) == [f"Line number {i}" for i in range(40)]
            cut = tmp_path / f"cut{power}.jsonl.zst"
            cut.write_bytes(raw[: len(raw) // 2])
            with pytest.raises(SourceError, match="damaged or truncated"):
                list(numbered_lines(str(cut)))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SourceError, match=r"window of at most 128 MiB, found a larger one.*zstd -d --long=31"):
        list(numbered_lines(str(path)))


@pytest.mark.parametrize("options", [ReadOptions(score_key="text"), ReadOptions(mask_key="text")])
def test_a_text_is_no_score_and_no_mask(tmp_path: Path, options: ReadOptions) -> None:
    """Guards against a key that names the text itself: nothing was read from it, every score became NaN and no span
    was masked, without a word."""
    path = write_jsonl(tmp_path / "t.jsonl", [make_text(1)])
    with pytest.raises(RecordError, match=r"t\.jsonl:1: .*(expected a finite number|spans: expected)"):
        run(tmp_path / "out", spec("d", "candidates", path), read=options)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("score", 10**400, "expected a finite number"),
        ("mask", [[True, 2]], "spans: expected"),
        ("mask", [[0.0, 1]], "spans"),
    ],
)
def test_values_that_are_no_numbers_are_named(tmp_path: Path, key: str, value: object, says: str) -> None:
    """Guards against an OverflowError for an integer beyond float64, and against true read as 1."""
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": make_text(1), "key": value}) + "\n")
    with pytest.raises(RecordError, match=rf"t\.jsonl:1: .*{says}"):
        run(tmp_path / "out", spec("d", "candidates", path), read=ReadOptions(**{f"{key}_key": "key"}))


def test_a_directory_gives_what_is_meant(tmp_path: Path) -> None:
    """Guards against editors' copies and trainers' folders as training text, and against linked folders left out."""
    data, other = tmp_path / "data", tmp_path / "other"
    wanted = [data / "a.jsonl", data / "deep/b.jsonl"]
    for path in (*wanted, *(data / p for p in (".ipynb_checkpoints/a.jsonl", "_delta_log/c.jsonl", ".d.jsonl",
                            "checkpoint-500/e.jsonl", "deep/checkpoints/f.jsonl")), other / "g.jsonl"):  # fmt: skip
        write_jsonl(path, [make_text(1)])
    (data / "linked").symlink_to(other)
    (data / "loop").symlink_to(data)
    files, aside = data_files(data, (".jsonl",))
    assert files == [str(data / "a.jsonl"), str(data / "deep/b.jsonl"), str(data / "linked/g.jsonl")]
    assert aside == sorted(
        str(data / p) + end
        for p, end in ((".ipynb_checkpoints", "/"), ("_delta_log", "/"), (".d.jsonl", ""), ("checkpoint-500", "/"),
                       ("deep/checkpoints", "/"), ("loop", "/"))
    )  # fmt: skip
    said: list[str] = []
    run(tmp_path / "out", spec("x", "candidates", data / "deep"), log=said.append, vocab_size=280)
    assert any(f"left out of {data / 'deep'}: {data / 'deep/checkpoints'}/" in line for line in said)
    (data / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    with pytest.raises(SourceError, match=r"gone\.jsonl: a link to .*nothing\.jsonl, which is not there"):
        data_files(data, (".jsonl",))
