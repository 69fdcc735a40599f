"""Selection inside Megatron-LM's own training loop: `megatron.training.pretrain`, as the wheel has it, on gloo.

Equal losses are equal in every printed digit (7 of losses, 4 of gradient norms), equal draws are the same ids.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron_lm_runs import DISTRIBUTED, SELECTION, LoopRuns, Outcome, loop_runs

OPUS = {"selection": SELECTION}
ALL = {"selection": {**SELECTION, "rho": 1.0}}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2": (2, DISTRIBUTED),
    "tp2": (2, ("--tensor-model-parallel-size", "2")),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
    "cp2": (2, ("--context-parallel-size", "2")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopRuns]:
    yield from loop_runs(tmp_path_factory.mktemp("megatron_lm"))


@pytest.fixture(scope="module")
def selected(runs: LoopRuns) -> Outcome:
    """A run of one process that selects half of its candidates."""
    return runs.run("selected", opus=OPUS)


def assert_same_losses(one: Outcome, other: Outcome) -> None:
    """Sums over ranks are taken in another order: the last of seven digits may differ."""
    assert one.steps.keys() == other.steps.keys()
    for step, (loss, _) in one.steps.items():
        assert float(other.steps[step][0]) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_rho_1_the_run_is_the_one_without_the_hook(runs: LoopRuns, layout: str) -> None:
    """Guards against a hook that changes a run: other samples, another order, gradients or weights touched."""
    world, arguments = LAYOUTS[layout]
    alone = runs.start(f"alone_{layout}", *arguments, world=world)
    hooked = runs.finish(runs.start(f"hooked_{layout}", *arguments, world=world, opus=ALL))
    assert len(hooked.steps) == 4
    assert runs.finish(alone).steps == hooked.steps
    assert np.isfinite(hooked.alignments()).all()  # every candidate of every step was scored
    assert len(hooked.alignments()) == 16


def test_two_data_parallel_ranks_choose_what_one_process_chooses(runs: LoopRuns, selected: Outcome) -> None:
    """Guards against ranks that score, gather or lay out their shares in another order than one process."""
    both = runs.run("dp2", *DISTRIBUTED, world=2, opus=OPUS)
    assert both.drawn() == selected.drawn()
    assert_same_losses(both, selected)
    np.testing.assert_allclose(both.alignments(), selected.alignments(), rtol=1e-4)


def test_ranks_that_share_sequences_choose_what_one_process_chooses(runs: LoopRuns) -> None:
    """Guards against scores that lack what other ranks hold.

    They begin at one checkpoint of a run without the hook, since Megatron initialises each layout with other weights.
    """
    torch_dist = ("--ckpt-format", "torch_dist")
    common = runs.run("common", *torch_dist, "--exit-interval", "2")
    outcomes = {}
    for layout in ("one", "tp2", "pp2", "cp2"):
        world, arguments = LAYOUTS[layout]
        more = (*arguments, *torch_dist, "--load", str(common.folder))
        outcomes[layout] = runs.run(f"from_common_{layout}", *more, world=world, opus=OPUS)
    one = outcomes["one"]
    assert "the checkpoint of iteration 2 holds no selection: selecting begins here" in one.log
    assert min(min(ids) for ids in one.drawn().values()) >= 8  # what was trained on without selection is not offered
    for other in (outcomes["tp2"], outcomes["pp2"], outcomes["cp2"]):
        assert other.drawn() == one.drawn()
        np.testing.assert_allclose(other.alignments(), one.alignments(), rtol=1e-4)
        assert_same_losses(other, one)


@pytest.mark.parametrize("format_", ["torch", "torch_dist"])
def test_a_resumed_run_is_the_straight_one(runs: LoopRuns, format_: str) -> None:
    """Guards against state that decides the next choices and is missing in a checkpoint, or lies behind it."""
    arguments = (*DISTRIBUTED, "--bf16", "--ckpt-format", format_)
    straight = runs.run(f"straight_{format_}", *arguments, "--save-interval", "2", world=2, opus=OPUS)
    folder = runs.root / f"resumed_{format_}"
    shutil.copytree(straight.folder, folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = runs.run(f"resumed_{format_}", *arguments, "--load", str(folder), world=2, opus=OPUS)
    assert set(resumed.steps) == {3, 4}
    assert resumed.drawn() == straight.drawn()
    # one line after a resume prints the mean of two losses, which is Megatron's own logging: ours has them apart
    for name in ("loss", "grad_norm", "lr", "update_tokens", "scored_tokens"):
        assert [row[name] for row in resumed.metrics()] == [row[name] for row in straight.metrics()]


def test_a_checkpoint_holds_our_state_before_megatron_names_it(selected: Outcome) -> None:
    """Guards against a tracker that names a checkpoint without our state, when the process dies between the two."""
    state = selected.folder / "opus" / "iter_0000004.pt"
    tracker = selected.folder / "latest_checkpointed_iteration.txt"
    assert state.stat().st_mtime_ns < tracker.stat().st_mtime_ns
    assert Path(tracker).read_text() == "4"
