"""What a resumed run is told of its record, before it goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_opus.runs.record import RunRecordError, compare_record


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a checkpoint at step 4, which was killed after step 5 (its sixth)."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(6)))
    (tmp_path / "ledger").mkdir()
    for first, last in ((0, 1), (2, 3), (4, 5)):
        steps = [step for step in range(first, last + 1) for _ in range(8)]
        pq.write_table(pa.table({"step": steps}), tmp_path / f"ledger/steps-{first:08d}-{last:08d}.parquet")
    marker = tmp_path / "checkpoints/step_00000004/complete.json"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}")
    return tmp_path


def test_steps_after_the_checkpoint_are_said(run: Path) -> None:
    """Guards against steps that are taken again without a word, and against warnings about what is whole."""
    assert compare_record(run) == [
        "the record reaches step 5, the checkpoint step 4: what lies between is done again",
    ]


def test_what_is_missing_or_torn_is_said(run: Path) -> None:
    """Guards against a hole in metrics or ledger that nobody notices until the run is evaluated."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + lines[3] + '{"step": 4, "lo')
    (run / "ledger/steps-00000002-00000003.parquet").unlink()
    torn, rows, ledger = compare_record(run)
    assert "its last line is torn" in torn
    assert "metrics.jsonl: 2 of 4 steps before the checkpoint are missing: 1 to 2" in rows
    assert "ledger: 2 of 4 steps before the checkpoint are missing: 2 to 3" in ledger


def test_rows_that_come_twice_or_out_of_order_are_said(run: Path) -> None:
    """Guards against a record put together from two copies: every step is there, and the curve goes back."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for rows in ([*lines[:3], *lines[2:]], [lines[0], lines[2], lines[1], *lines[3:]]):
        (run / "metrics.jsonl").write_text("".join(rows))
        assert any("twice or out of order" in line for line in compare_record(run))


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "ledger", "checkpoints"])
@pytest.mark.parametrize("how", ["pipe", "link", "other"])
def test_pipes_and_folders_in_place_of_files_are_refused(run: Path, name: str, how: str) -> None:
    """Guards against a run that waits at a pipe for ever, and against a traceback while it starts."""
    path = run / name
    folder = path.is_dir()
    if path.exists():
        shutil.rmtree(path) if folder else path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to(run / "nowhere")
    else:
        path.touch() if folder else path.mkdir()
    with pytest.raises(RunRecordError, match=rf"{name}: expected a (file|folder), found something else"):
        compare_record(run)


def test_what_cannot_be_read_is_refused(run: Path) -> None:
    """Guards against a traceback out of the Parquet reader, and a run that goes on over a broken record."""
    part = run / "ledger/steps-00000002-00000003.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:50])
    with pytest.raises(
        RunRecordError, match=r"steps-00000002-00000003.parquet cannot be read .* bring it back from a copy"
    ):
        compare_record(run)
    part.write_bytes(whole)
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(RunRecordError, match="line 2: not a row of metrics"):
        compare_record(run)


def test_a_run_that_has_just_begun_misses_nothing(tmp_path: Path) -> None:
    """Guards against warnings of a run that was killed before its first step."""
    assert compare_record(tmp_path) == []
