"""SIGKILL at seeded moments, on two ranks, inside and between checkpoint writes."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from chaos import INTERVAL, STEPS, Arena, KillAtFileEvent

pytestmark = pytest.mark.slow
KILLS, SHORT = 20, 4
EVENTS = 60  # file events of a rank in two checkpoint writes, roughly


def kill_again_and_again(arena: Arena, runs: Path, kills: int, seed: int) -> int:
    """Kill so often, every other time inside of a checkpoint's writing; how many of those left it unfinished."""
    chance, unfinished, number = random.Random(seed), 0, 0
    for attempt in range(kills):
        folder = runs / f"killed{number}"
        within_write, rank = attempt % 2 == 0, chance.randrange(2)
        kill = KillAtFileEvent(rank, chance.randrange(2, EVENTS), f"{folder}/checkpoints/")
        run = arena.start(
            folder.name,
            resume=(folder / "config.yaml").exists(),
            runs=runs,
            prepare=kill if within_write else None,
        )
        if within_write:
            assert run.wait([rank]) == {rank: -9}, run.log(rank)
            newest = max((folder / "checkpoints").glob("step_*"))
            unfinished += not (newest / "complete.json").exists()
        else:
            before = run.steps()
            run.reach(lambda run=run, before=before: run.steps() != before)
            time.sleep(chance.uniform(0, 0.3))
        run.kill()
        if arena.same_until_checkpoint(folder) >= STEPS - 2 * INTERVAL:
            arena.finish(folder)
            number += 1
    if (folder := runs / f"killed{number}").exists():
        arena.finish(folder)
    return unfinished


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_been(arena: Arena, tmp_path: Path, whole: bool) -> None:
    """Guards against a checkpoint that counts before it is whole, a generator or a returned candidate missing from it,
    and rows of metrics or ledger that come twice or are lost."""
    assert kill_again_and_again(arena, tmp_path, KILLS if whole else SHORT, seed=7) > 0


def test_the_same_with_megatrons_engine(megatron_arena: Arena, tmp_path: Path, whole: bool) -> None:
    """Guards against the same faults in Megatron's own checkpoints, which it writes from processes of its own."""
    assert kill_again_and_again(megatron_arena, tmp_path, KILLS if whole else 1, seed=11) > 0
