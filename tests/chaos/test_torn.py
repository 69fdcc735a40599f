"""Files that are cut short or changed: what a killed process leaves goes on, and damage is refused with its file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from chaos import Arena

from megatron_opus.runs.checkpoints import complete
from megatron_opus.runs.ledger import ledger_parts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def killed(arena: Arena, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after step 7, with its two newest checkpoints kept."""
    runs = tmp_path_factory.mktemp("torn")
    run = arena.start("run", resume=False, runs=runs)
    run.reach(lambda: len(complete(runs / "run/checkpoints")) == 2 and run.steps() >= 7 and run.steps() % 2 == 1)
    run.kill()
    arena.same_until_checkpoint(runs / "run")
    return runs / "run"


def cut(path: Path, left: int = 7) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - left)


def flip(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def test_what_a_killed_process_leaves_is_no_obstacle(arena: Arena, killed: Path, tmp_path: Path) -> None:
    """Guards against a run that cannot be resumed for a torn line, a part file of the ledger or an unfinished
    checkpoint, and against one that takes them for whole."""
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "lo')
    (folder / "ledger/steps-00000006-00000009.parquet.1.partial").write_bytes(b"PAR1")
    newest = complete(folder / "checkpoints")[-1]
    unfinished = folder / "checkpoints/step_00000099"
    shutil.copytree(newest, unfinished)
    (unfinished / "complete.json").rename(unfinished / "complete.json.1.partial")
    (folder / "lock").write_bytes(b"")
    last = arena.finish(folder)
    assert "its last line is torn" in last.log(0)


FILES = ("state.pt", "rng_00001.pt", "engine", "complete.json", "ledger")
# one changed byte of the ledger need not change a row: tests/runs/test_ledger.py tries them all over the file
HARM = [(harm, which) for harm in (cut, flip) for which in FILES if (harm, which) != (flip, "ledger")]


@pytest.mark.parametrize(("harm", "which"), HARM, ids=lambda x: getattr(x, "__name__", x))
def test_damage_is_refused_with_its_file(
    arena: Arena, killed: Path, tmp_path: Path, whole: bool, harm: object, which: str
) -> None:
    """Guards against a run that goes on from a checkpoint or a record that is not what was written. What the refusal
    says to do leads back to the undisturbed run."""
    if not whole and (harm, which) not in ((flip, "engine"), (cut, "complete.json")):
        pytest.skip("in the whole form")
    assert callable(harm)
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    newest = complete(folder / "checkpoints")[-1]
    if which == "ledger":
        damaged = ledger_parts(folder / "ledger")[0][2]
    elif which == "engine":
        damaged = max((p for p in (newest / "engine").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    else:
        damaged = newest / which
    before = damaged.read_bytes()
    harm(damaged)
    run = arena.start("run", resume=True, runs=tmp_path)
    assert run.wait() == {0: 2, 1: 2}, run.log(0)
    assert damaged.name in run.log(0)
    assert "Traceback" not in run.log(0) + run.log(1)
    if which == "ledger":
        damaged.write_bytes(before)  # brought back from a copy
    else:
        shutil.rmtree(newest)  # resume from the one before
    arena.finish(folder)
