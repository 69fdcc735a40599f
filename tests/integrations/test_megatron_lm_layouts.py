"""Selection under layouts that are put together: what they draw is what one process draws.

All begin at one `torch_dist` checkpoint of a run without the hook, as Megatron gives each layout other weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from megatron_lm_runs import SELECTION, LoopRuns, Outcome, loop_runs

OPUS = {"selection": SELECTION}
DEEP = ("--num-layers", "4", "--ckpt-format", "torch_dist")
TP, PP, CP = ((f"--{kind}-parallel-size", "2") for kind in ("tensor-model", "pipeline-model", "context"))
LAYOUTS = {  # of four processes
    "tensor x pipeline": (*TP, *PP),
    "tensor x context": (*TP, *CP),
    "context x pipeline": (*CP, *PP),
    "virtual stages x data": (*PP, "--num-virtual-stages-per-pipeline-rank", "2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopRuns]:
    yield from loop_runs(tmp_path_factory.mktemp("megatron_lm_layouts"))


@pytest.fixture(scope="module")
def load(runs: LoopRuns) -> tuple[str, ...]:
    """Arguments that begin at the common checkpoint."""
    return (*DEEP, "--load", str(runs.run("common", *DEEP, "--exit-interval", "1").folder))


@pytest.fixture(scope="module")
def one(runs: LoopRuns, load: tuple[str, ...]) -> Outcome:
    """One process that selects."""
    return runs.run("one", *load, opus=OPUS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_choose_what_one_process_chooses(
    runs: LoopRuns, load: tuple[str, ...], one: Outcome, layout: str
) -> None:
    """Guards against sums that are right in one direction of the layout alone."""
    four = runs.run(layout.replace(" ", "_"), *load, *LAYOUTS[layout], world=4, opus=OPUS)
    assert four.drawn() == one.drawn()
    np.testing.assert_allclose(four.alignments(), one.alignments(), rtol=1e-3, atol=1e-6)
    for step, (loss, _) in one.steps.items():
        assert float(four.steps[step][0]) == pytest.approx(float(loss), rel=1e-6)
