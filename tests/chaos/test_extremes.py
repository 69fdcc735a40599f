"""Every number of a recipe at both of its bounds: what a dry run accepts runs, or is refused before it begins."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from config_numbers import MAPPINGS, extremes, numeric
from launched import ROOT, Server, tiny

from megatron_opus.config import ConfigError, load, validate_world

pytestmark = pytest.mark.slow
CASES = [
    (".".join(path), value)
    for path, kind, bounds in numeric()
    if path[-1] not in MAPPINGS
    for value in extremes(kind, bounds)
    # a billion steps, and ten thousand layers, are what was asked for, and take their time
    if (".".join(path), value) not in (("training.train_steps", 10**9), ("model.num_layers", 10_000))
]
SHORT = random.Random(3).sample(range(len(CASES)), 3)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{key}={value!r}" for key, value in CASES])
def test_what_a_dry_run_accepts_does_not_end_in_a_traceback(
    server: Server, embedded_cache: Path, tmp_path: Path, whole: bool, number: int
) -> None:
    """Guards against a number that is taken at first and ends in a traceback at step 0."""
    if not whole and number not in SHORT:
        pytest.skip("in the whole form")
    key, value = CASES[number]
    arguments = tiny(embedded_cache, tmp_path, "run", "training.checkpoint_interval=0", "training.train_steps=2")
    arguments.append(f"{key}={value!r}")
    try:
        validate_world(load(ROOT / "configs/pretrain_gpt2_tiny.yaml", arguments), 1)
    except ConfigError:
        return
    run = server.launch(1, arguments, tmp_path / "logs")
    status = run.wait()[0]
    assert status in (0, 1, 2, 75), run.log(0)
    assert "Traceback" not in run.log(0)
    assert status not in (1, 2) or "error: " in run.log(0)
