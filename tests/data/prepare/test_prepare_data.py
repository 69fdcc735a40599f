from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import die_at_rename, killed, make_text, run, spec, texts_of, write_jsonl

from megatron_opus.backends.formats import indexed
from megatron_opus.data import manifest as manifests
from megatron_opus.data.prepare.records import ReadOptions
from megatron_opus.data.prepare.resolve import DatasetSpec, PrepareError, holdout
from megatron_opus.data.prepare.tokenize import JobRunner, RecordError

ROOT = Path(__file__).resolve().parents[3]


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


def test_kill_at_every_commit_and_resume(
    mixture: tuple[DatasetSpec, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Guards against a resumed preparation that differs from an uninterrupted one, or redoes finished shards.

    The process is killed right before one of its atomic renames, which are all states in which it can leave files:
    every eighth, or in the whole form every fourth.
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

    for kill_at in range(0, total, 4 if whole else 8):
        out = tmp_path / f"killed-{kill_at}"
        die_at_rename(monkeypatch, kill_at)
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


def beginning(source: Path, target: Path, documents: int = 250) -> Path:
    """The first documents of a file of real text."""
    with source.open("rb") as stream:
        target.write_bytes(b"".join(itertools.islice(stream, documents)))
    return target


def test_kill_while_workers_run(tmp_path: Path, shared_data: Path) -> None:
    """Guards against half-written shards of worker processes after SIGKILL of the command."""
    source = beginning(shared_data / "pile_domains" / "wikipedia_en.jsonl", tmp_path / "wikipedia_en.jsonl")
    # Shards of the default size would leave one per file here.
    settings = {"workers": 2, "shard_bytes": 50_000, "tokenizer": f"gpt2:{shared_data / 'tokenizer_gpt2'}"}
    wiki = spec("wiki", "candidates", source)
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests/support')!r}]\n"
        "from data_helpers import run, spec; from pathlib import Path\n"
        f"run(Path(sys.argv[1]), spec('wiki', 'candidates', {str(source)!r}), **{settings!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "killed")])
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "killed").glob(".work/tokens/**/*.json"))) < 4:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it tokenizes nothing"
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
    from megatron_opus.files import locked

    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".lock"), pytest.raises(BlockingIOError, match="another preparation"):
        run(tmp_path / "out", *mixture, **SMALL)


def test_command_line(tmp_path: Path, shared_data: Path) -> None:
    """Guards against options that are accepted and ignored, and tracebacks where a sentence would do."""
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--output", str(tmp_path / "out")]
    command += ["--tokenizer", f"gpt2:{shared_data / 'tokenizer_gpt2'}", "--workers", "1"]
    for name in ("pile_domains/dm_mathematics", "pile_domains/nih_exporter", "law_dc/laws"):
        beginning(shared_data / f"{name}.jsonl", tmp_path / f"{Path(name).name}.jsonl")
    command += ["--candidates", f"math={tmp_path / 'dm_mathematics.jsonl'}"]
    command += ["--candidates", f"math={tmp_path / 'nih*.jsonl'}"]
    command += ["--target", f"law={tmp_path / 'laws.jsonl'}", "--holdout", "0.25"]
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
