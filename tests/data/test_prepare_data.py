from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_text, write_jsonl

from megatron_opus.backends import indexed
from megatron_opus.data import manifest as manifests
from megatron_opus.data import tokenizers, worker
from megatron_opus.data.manifest import Manifest
from megatron_opus.data.plan import DatasetSpec, PrepareConfig, PrepareError, holdout
from megatron_opus.data.prepare import prepare
from megatron_opus.data.records import ReadOptions, SourceError
from megatron_opus.data.shards import JobRunner, RecordError

ROOT = Path(__file__).resolve().parents[2]


def spec(name: str, role: Any, *sources: Path | str) -> DatasetSpec:
    return DatasetSpec(name=name, role=role, sources=tuple(map(str, sources)))


def run(output: Path, *datasets: DatasetSpec, log: Callable[[str], None] = lambda _: None, **settings: Any) -> Manifest:
    config = PrepareConfig(
        **{
            "output": output,
            "tokenizer": "train-sentencepiece",
            "vocab_size": 300,
            "datasets": datasets,
            "progress": False,
            **settings,
        }
    )
    return prepare(config, indexed, log)


def texts_of(output: Path, role: str, name: str) -> list[str]:
    """The documents of a prepared dataset, decoded."""
    manifest = manifests.read(output)
    tokenizer = tokenizers.reopen(output / "tokenizer", manifest.tokenizer)
    documents = indexed.open_documents(name, output / role / name)
    ends = documents.document_ends
    starts = np.concatenate([[0], ends[:-1]])
    found = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        ids = documents.tokens(start, end - start).tolist()
        assert ids[-1] == tokenizer.eod
        assert tokenizer.eod not in ids[:-1]
        found.append(tokenizer.decode(ids))
    return found


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[DatasetSpec, ...]:
    """Every kind of file, several shards each (see shard_bytes), a target, and documents that leak between roles."""
    candidates = [make_text(i) for i in range(80)]
    target = [make_text(1000 + i) for i in range(50)]
    extra = [make_text(2000 + i) for i in range(8)]
    leaked = [target[i] for i in range(0, 50, 5)] + [extra[0] + "  \n", extra[1]]
    write_jsonl(tmp_path / "a.jsonl", candidates + leaked)
    more = pa.table({"text": [make_text(3000 + i) for i in range(40)]})
    pq.write_table(more, tmp_path / "b.parquet", row_group_size=9)
    (tmp_path / "c.txt").write_text("\n\n".join(make_text(4000 + i) for i in range(30)), encoding="utf-8")
    write_jsonl(tmp_path / "target.jsonl", target)
    write_jsonl(tmp_path / "extra.jsonl", [*extra, *target[:12]])
    return (
        spec("web", "candidates", tmp_path / "a.jsonl", tmp_path / "b.parquet"),
        spec("notes", "candidates", tmp_path / "c.txt"),
        *holdout("goal", (str(tmp_path / "target.jsonl"),), 0.3),
        spec("extra", "proxy", tmp_path / "extra.jsonl"),
    )


SMALL = {"shard_bytes": 3000, "read": ReadOptions(txt_documents="paragraph")}


def test_held_out_documents_never_enter_a_lower_role(mixture: tuple[DatasetSpec, ...], tmp_path: Path) -> None:
    """Guards against validation text in candidates or proxy, and proxy text in candidates: both flatter the method."""
    manifest = run(tmp_path / "out", *mixture, **SMALL)
    plain = {
        (e.role, e.name): {" ".join(t.split()) for t in texts_of(tmp_path / "out", e.role, e.name)}
        for e in manifest.datasets
    }
    validation = plain["validation", "goal"]
    proxy = plain["proxy", "goal"] | plain["proxy", "extra"]
    candidates = plain["candidates", "web"] | plain["candidates", "notes"]
    assert validation
    assert not validation & proxy
    assert not validation & candidates
    assert not proxy & candidates
    assert len(validation | plain["proxy", "goal"]) == 50, "the target is split, nothing is lost"
    dropped = {(e.role, e.name): e.held_out for e in manifest.datasets}
    assert dropped["candidates", "web"] == 12
    assert dropped["candidates", "notes"] == 0
    in_validation = sum(make_text(1000 + i) in validation for i in range(12))
    assert dropped["proxy", "extra"] == in_validation > 0, "a proxy loses what validation has"
    assert in_validation < 12, "and keeps what another proxy has"
    assert len(plain["candidates", "web"]) == 120


def test_documents_come_through_unchanged(mixture: tuple[DatasetSpec, ...], tmp_path: Path) -> None:
    """Guards against documents lost, doubled or reordered at the borders of shards."""
    run(tmp_path / "out", *mixture, **SMALL)
    web = texts_of(tmp_path / "out", "candidates", "web")
    assert web == [make_text(i) for i in range(80)] + [make_text(3000 + i) for i in range(40)]
    assert texts_of(tmp_path / "out", "candidates", "notes") == [make_text(4000 + i) for i in range(30)]


def test_output_does_not_depend_on_workers_or_shards(mixture: tuple[DatasetSpec, ...], tmp_path: Path) -> None:
    """Guards against data that cannot be reproduced on another machine."""
    run(tmp_path / "one", *mixture, **SMALL, workers=1)
    run(tmp_path / "three", *mixture, **SMALL, workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    # The tokenizer is trained on the beginnings of shards, so other shards are compared with a fixed one.
    model = f"sentencepiece:{tmp_path / 'one' / 'tokenizer' / 'sentencepiece.model'}"
    for shard_bytes in (701, 10**6):
        run(tmp_path / str(shard_bytes), *mixture, **{**SMALL, "shard_bytes": shard_bytes}, tokenizer=model)
    assert content(tmp_path / "701") == content(tmp_path / "1000000")


def test_manifest(mixture: tuple[DatasetSpec, ...], tmp_path: Path) -> None:
    """Guards against a manifest that does not describe the files beside it."""
    import hashlib

    out = tmp_path / "out"
    manifest = run(out, *mixture, **SMALL, provenance={"why": "test"})
    assert manifests.read(out) == manifest
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock", "candidates", "manifest.json", "proxy", "tokenizer", "validation",
    ]  # fmt: skip
    for entry in manifest.datasets:
        for suffix, expected in ((".bin", entry.bin_sha256), (".idx", entry.idx_sha256)):
            assert hashlib.sha256((out / f"{entry.prefix}{suffix}").read_bytes()).hexdigest() == expected
        documents = indexed.open_documents(entry.name, out / entry.prefix)
        assert (documents.num_tokens, len(documents.document_ends)) == (entry.tokens, entry.documents)
        for source in entry.sources:
            data = Path(source["path"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (source["bytes"], source["sha256"])
    assert manifest.provenance == {"why": "test"}
    other = replace(manifest, datasets=manifest.datasets[1:])
    assert other.fingerprint() != manifest.fingerprint()


# --- interruptions --------------------------------------------------------------------------------------------------


def killed(function: Callable[[], Any]) -> None:
    """Run in a forked process that kills itself with SIGKILL; fails if it ends in any other way."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_kill_at_every_commit_and_resume(
    mixture: tuple[DatasetSpec, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a resumed preparation that differs from an uninterrupted one, or redoes finished shards.

    The process is killed right before each of its atomic renames, that is in every state in which it can leave files.
    """
    replace_file = os.replace
    names: list[str] = []

    def noting(source: Any, target: Any) -> None:
        names.append(Path(target).name)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", noting)
    run(tmp_path / "whole", *mixture, **SMALL)
    expected = content(tmp_path / "whole")
    total = len(names)
    assert total > 60
    runs: list[str] = []
    run_job = JobRunner.run

    def noting_job(self: JobRunner, job: Any, report: Any) -> Any:
        runs.append(job.output)
        return run_job(self, job, report)

    for kill_at in range(0, total, 4):
        out = tmp_path / f"killed-{kill_at}"
        left = kill_at

        def die(source: Any, target: Any) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            replace_file(source, target)

        monkeypatch.setattr(os, "replace", die)
        killed(lambda out=out: run(out, *mixture, **SMALL))
        assert not (out / "manifest.json").exists()
        finished = {str(p.with_suffix("")) for p in (out / ".work").glob("*/**/[0-9]*.json")}
        monkeypatch.setattr(os, "replace", replace_file)
        monkeypatch.setattr(JobRunner, "run", noting_job)
        runs.clear()
        run(out, *mixture, **SMALL)
        monkeypatch.setattr(JobRunner, "run", run_job)
        assert not finished & set(runs)
        assert content(out) == expected


def test_kill_while_workers_run(tmp_path: Path, shared_data: Path) -> None:
    """Guards against half-written shards of worker processes after SIGKILL of the command."""
    source = shared_data / "pile_domains" / "wikipedia_en.jsonl"
    # Shards of the default size would leave one per file here.
    settings = {"workers": 2, "shard_bytes": 200_000, "tokenizer": f"gpt2:{shared_data / 'tokenizer_gpt2'}"}
    wiki = spec("wiki", "candidates", source)
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_prepare_data import run, spec; from pathlib import Path\n"
        f"run(Path(sys.argv[1]), spec('wiki', 'candidates', {str(source)!r}), **{settings!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "killed")])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob(".work/tokens/**/*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    run(tmp_path / "killed", wiki, **settings)
    run(tmp_path / "whole", wiki, **settings)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_other_settings_are_refused(mixture: tuple[DatasetSpec, ...], tmp_path: Path) -> None:
    """Guards against one directory made of two settings, whether it is finished or not."""
    out = tmp_path / "out"
    run(out, *mixture, **SMALL)
    before = content(out)
    said: list[str] = []
    run(out, *mixture, **SMALL, log=said.append)
    assert "already prepared" in said[0]
    for change, message in (
        ({"vocab_size": 301}, "vocab_size: then 300, now 301"),
        ({"datasets": mixture[:-1]}, r"datasets proxy/extra: then .*extra\.jsonl.* now absent"),
        ({"on_error": "skip"}, "on_error"),
    ):
        with pytest.raises(PrepareError, match=message):
            run(out, *mixture, **{**SMALL, **change})
    (tmp_path / "a.jsonl").touch()
    run(out, *mixture, **SMALL)  # touched, but the same content
    assert content(out) == before
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(PrepareError, match=r"a\.jsonl has changed since"):
        run(out, *mixture, **SMALL)
    (out / "manifest.json").unlink()
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{\n')
    broken = spec("web", "candidates", tmp_path / "broken.jsonl")
    with pytest.raises(RecordError):
        run(tmp_path / "two", broken)
    with pytest.raises(PrepareError, match="unfinished preparation with other settings"):
        run(tmp_path / "two", broken, on_error="skip")


def test_only_one_preparation_at_a_time(mixture: tuple[DatasetSpec, ...], tmp_path: Path) -> None:
    """Guards against two commands that write into the same directory."""
    from megatron_opus.data.files import locked

    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".lock"), pytest.raises(BlockingIOError, match="another preparation"):
        run(tmp_path / "out", *mixture, **SMALL)


# --- bad input ------------------------------------------------------------------------------------------------------

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
        ("data.csv", r"expected a \.jsonl, \.txt, \.parquet file, got suffix '\.csv'"),
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


def test_command_line(tmp_path: Path, shared_data: Path) -> None:
    """Guards against options that are accepted and ignored, and tracebacks where a sentence would do."""
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--output", str(tmp_path / "out")]
    command += ["--tokenizer", f"gpt2:{shared_data / 'tokenizer_gpt2'}", "--workers", "1"]
    pile = shared_data / "pile_domains"
    command += ["--candidates", f"math={pile / 'dm_mathematics.jsonl'}", "--candidates", f"math={pile / 'nih*.jsonl'}"]
    command += ["--target", f"law={shared_data / 'law_dc' / 'laws.jsonl'}", "--holdout", "0.25"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train on it with data=" in done.stdout
    manifest = manifests.read(tmp_path / "out")
    assert [(e.role, e.name, len(e.sources)) for e in manifest.datasets] == [
        ("candidates", "math", 2), ("validation", "law", 1), ("proxy", "law", 1),
    ]  # fmt: skip
    sizes = {e.role: e.documents for e in manifest.datasets}
    assert 0.1 < sizes["validation"] / (sizes["validation"] + sizes["proxy"]) < 0.4
    bad = subprocess.run([*command, "--candidates", "nothing"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "expected NAME=FILES" in bad.stderr
    assert "Traceback" not in bad.stderr
