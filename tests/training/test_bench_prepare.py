from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opus.training import bench_prepare

ROOT = Path(__file__).resolve().parents[2]


def test_both_sides_do_the_same_work(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a comparison with a side that does less, and a ratio that is upside down."""
    lines = (shared_data / "pile_domains" / "nih_exporter.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join([*lines, lines[0]]) + "\n", encoding="utf-8")
    bench = tmp_path / "b.jsonl"
    bench.write_text(json.dumps({"q": json.loads(lines[5])["text"][:400]}) + "\n")
    tokenizer = f"gpt2:{shared_data / 'tokenizer_gpt2'}"
    timings = bench_prepare.compare(source, tokenizer, workers=1, repeats=1, benchmarks=(str(bench),))
    theirs, same, default, clean = timings
    assert theirs.tokens == same.tokens > default.tokens > clean.tokens, "a duplicate, then a benchmark's document less"
    assert (theirs.wall_ratio, theirs.cpu_ratio) == (1.0, 1.0)
    for ours in timings[1:]:
        assert ours.wall_ratio == pytest.approx(theirs.wall / ours.wall)
        assert ours.cpu_ratio == pytest.approx(theirs.cpu / ours.cpu)
    assert len(bench_prepare.table(timings).splitlines()) == 6
    monkeypatch.setattr(bench_prepare, "megatron_preprocess", lambda source, prefix, *_: _half(prefix))
    with pytest.raises(bench_prepare.BenchError, match=r"the \.bin files differ"):
        bench_prepare.compare(source, tokenizer, workers=1, repeats=1)


def _half(prefix: Path) -> int:
    for suffix in (".bin", ".idx"):
        prefix.with_name(prefix.name + suffix).write_bytes(b"less")
    return 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--input", "missing.jsonl"], r"missing\.jsonl: expected a .jsonl file"),
        (["--repeats", "0"], "expected at least 1"),
    ],
)
def test_bad_arguments(tmp_path: Path, change: list[str], message: str) -> None:
    """Guards against a traceback, or nothing measured, where an argument is off."""
    command = [sys.executable, str(ROOT / "tools" / "bench_prepare.py"), "--input", "x.jsonl", "--tokenizer", "gpt2:x"]
    done = subprocess.run([*command, *change], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert message.replace("\\", "") in done.stderr
    assert "Traceback" not in done.stderr
