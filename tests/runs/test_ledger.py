from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from megatron_opus.runs.ledger import SCHEMA, LedgerError, LedgerWriter, read_ledger, usage
from megatron_opus.types import Candidates, Selection, Signals

N, K = 6, 2
ROOT = Path(__file__).resolve().parents[2]


def step_rows(step: int) -> tuple[Candidates, Signals, Selection]:
    values = torch.arange(N, dtype=torch.float64) + step
    candidates = Candidates(step=step, sample_ids=np.arange(N) + 10 * step, domains=(np.arange(N) % 2).astype(np.int32))
    finite = torch.ones(N, dtype=torch.bool)
    finite[5] = False
    selection = Selection(indices=torch.tensor([4, 1]), utility=-values, redundancy=values / 2)
    return candidates, Signals(alignment=values, finite=finite), selection


def write(directory: Path, steps: range, flush_every: int = 100) -> LedgerWriter:
    ledger = LedgerWriter(directory, ["a", "b"])
    for step in steps:
        ledger.append(*step_rows(step))
        if (step + 1) % flush_every == 0:
            ledger.flush()
    return ledger


def test_one_row_per_candidate(tmp_path: Path) -> None:
    """Guards against a decision that cannot be traced: a column missing, in another order or of another candidate."""
    write(tmp_path, range(3)).flush()
    assert [p.name for p in tmp_path.iterdir()] == ["steps-00000000-00000002.parquet"]
    table = read_ledger(tmp_path)
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert len(rows) == 3 * N
    assert rows[N + 4] == {
        "step": 1,
        "sample_id": 14,
        "domain": "a",
        "alignment": 5.0,
        "redundancy": 2.5,
        "utility": -5.0,
        "selected": True,
        "draw_order": 0,
        "finite": True,
        "excluded": None,
    }
    assert [r["draw_order"] for r in rows[:N]] == [-1, 1, -1, -1, 0, -1]
    assert not rows[5]["finite"]
    assert [r["excluded"] for r in rows[:N]] == [None] * 5 + ["non-finite factors"]


def test_strategies_without_scores(tmp_path: Path) -> None:
    """Guards against zeros in the ledger where nothing was computed."""
    ledger = LedgerWriter(tmp_path, ["a", "b"])
    ledger.append(step_rows(0)[0], Signals(), Selection(indices=torch.tensor([0])))
    ledger.flush()
    row = read_ledger(tmp_path).to_pylist()[0]
    assert (row["alignment"], row["utility"], row["redundancy"]) == (None, None, None)
    assert row["finite"]


def test_the_reason_of_an_exclusion_is_kept(tmp_path: Path) -> None:
    """Guards against a candidate that was never to be drawn and looks like one that was only unlucky."""
    nan = float("nan")
    candidates, _, selection = step_rows(0)
    signals = Signals(
        alignment=torch.tensor([1.0, nan, 1.0, float("inf"), 1.0, 1.0], dtype=torch.float64),
        loss=torch.tensor([1.0, nan, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        finite=torch.tensor([True, False, False, False, True, True]),
    )
    ledger = LedgerWriter(tmp_path, ["a", "b"])
    ledger.append(candidates, signals, selection)
    ledger.flush()
    assert read_ledger(tmp_path)["excluded"].to_pylist() == [
        None,
        "non-finite loss",
        "non-finite factors",
        "non-finite alignment",
        None,
        None,
    ]


def test_usage(tmp_path: Path) -> None:
    """Guards against a count of offers or uses that is not the ledger's: it tells repeated data apart."""
    ledger = LedgerWriter(tmp_path, ["a", "b"])
    for step in range(3):
        candidates, signals, selection = step_rows(0)
        again = Candidates(step=step, sample_ids=candidates.sample_ids, domains=candidates.domains)
        ledger.append(again, signals, Selection(indices=selection.indices[: 1 + step % 2]))
    ledger.flush()
    rows = usage(read_ledger(tmp_path)).to_pylist()
    assert [r["sample_id"] for r in rows] == list(range(N))
    assert [r["offered"] for r in rows] == [3] * N
    assert [r["used"] for r in rows] == [0, 1, 0, 0, 3, 0]


def test_nothing_to_flush(tmp_path: Path) -> None:
    """Guards against empty parts whose name covers no step."""
    assert LedgerWriter(tmp_path, ["a"]).flush() is None
    assert read_ledger(tmp_path).num_rows == 0


@pytest.mark.parametrize("resume_at", [0, 1, 4, 5, 7, 10, 12])
def test_truncate_and_go_on(tmp_path: Path, resume_at: int) -> None:
    """Guards against rows twice, or missing, after a resume at (or, by accident, inside of) a part."""
    write(tmp_path, range(12), flush_every=5).flush()
    (tmp_path / "steps-00000012-00000014.parquet.77.partial").write_bytes(b"torn")
    resumed = LedgerWriter(tmp_path, ["a", "b"])
    resumed.truncate(resume_at)
    for step in range(resume_at, 14):
        resumed.append(*step_rows(step))
    resumed.flush()
    table = read_ledger(tmp_path)
    assert table["step"].to_pylist() == [s for s in range(14) for _ in range(N)]
    assert not list(tmp_path.glob("*.partial"))


def test_resume_without_truncate_is_refused(tmp_path: Path) -> None:
    """Guards against rows twice when a driver forgets to truncate."""
    write(tmp_path, range(5)).flush()
    with pytest.raises(LedgerError, match="truncate"):
        LedgerWriter(tmp_path, ["a", "b"]).append(*step_rows(4))


def test_reading_checks_the_steps(tmp_path: Path) -> None:
    """Guards against a report made from a ledger with holes or overlaps."""
    write(tmp_path, range(4), flush_every=2)
    parts = sorted(tmp_path.iterdir())
    write(tmp_path / "more", range(6, 8)).flush()
    (tmp_path / "more" / "steps-00000006-00000007.parquet").rename(tmp_path / "steps-00000006-00000007.parquet")
    with pytest.raises(LedgerError, match="2 steps are missing, the first is 4"):
        read_ledger(tmp_path)
    assert read_ledger(tmp_path, complete=False).num_rows == 6 * N
    pq.write_table(pq.read_table(parts[0]), tmp_path / "steps-00000001-00000001.parquet")
    with pytest.raises(LedgerError, match="cover the same steps"):
        read_ledger(tmp_path, complete=False)


def test_a_crash_inside_truncate_is_repaired(tmp_path: Path) -> None:
    """Guards against the moment in which the shortened part and the old one both exist."""
    write(tmp_path, range(6)).flush()
    old = (tmp_path / "steps-00000000-00000005.parquet").read_bytes()
    LedgerWriter(tmp_path, ["a", "b"]).truncate(3)
    (tmp_path / "steps-00000000-00000005.parquet").write_bytes(old)
    LedgerWriter(tmp_path, ["a", "b"]).truncate(3)
    assert [p.name for p in tmp_path.iterdir()] == ["steps-00000000-00000002.parquet"]
    assert read_ledger(tmp_path).num_rows == 3 * N


def test_a_killed_writer_leaves_whole_parts(tmp_path: Path) -> None:
    """Guards against a torn part after SIGKILL: whatever is visible must be readable and whole."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        f"from test_ledger import write; from pathlib import Path\n"
        f"write(Path({str(tmp_path)!r}), range(100000), flush_every=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("*.parquet"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    table = read_ledger(tmp_path)
    assert table.num_rows % (2 * N) == 0
    assert table.num_rows >= 40 * N


def test_a_changed_byte_is_refused_or_changes_no_row(tmp_path: Path) -> None:
    """Guards against rows that a disk has changed where no checksum of a page looks, in headers and in the footer."""
    write(tmp_path, range(3)).flush()
    (part,) = tmp_path.iterdir()
    whole, rows = part.read_bytes(), read_ledger(tmp_path).to_pylist()
    said = []
    for place in range(0, len(whole), 13):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert read_ledger(tmp_path).to_pylist() == rows
        except LedgerError as error:
            said.append(str(error))
    assert len(said) > len(whole) / 13 / 4
    assert all(part.name in one for one in said)
