"""Save, be killed, resume: the same losses bit for bit, or an error that says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpt_runs import GPT2, recipe, start, steps

from megatron_opus.errors import CheckpointError
from megatron_opus.runs import checkpoints

PRINTS = {"data": "abc", "tokenizer": "def"}
DROPOUT = dataclasses.replace(GPT2, hidden_dropout=0.1, attention_dropout=0.1)


def save_now(engine: Any, directory: str, config: Any, step: int, keep: int = 2, **state: Any) -> Path:
    from megatron_opus.training import checkpoint

    return checkpoint.save(
        engine, Path(directory), step=step, state=state, fingerprints=PRINTS, config=config, keep=keep
    )


def run_and_save(arguments: dict[str, Any], directory: str) -> list[tuple[float, float]]:
    """Three steps, a checkpoint, three more: the losses of the last three."""
    config = recipe(**arguments)
    engine, groups = start(config)
    steps(engine, groups, 0, 3)
    generator = torch.Generator().manual_seed(5)
    save_now(engine, directory, config, 3, generator=generator.get_state(), ids=np.arange(3))
    return [*steps(engine, groups, 3, 6), (random.random(), float(np.random.rand())), second_moments(engine)]


def second_moments(engine: Any) -> tuple[float, float]:
    """Steps and sum of what the selector keeps itself."""
    moment = engine.deepspeed.step_settings.second_moment
    if moment is None:
        return 0.0, 0.0
    state = moment.state_dict()
    return float(state["steps"]), sum(float(v.double().sum()) for v in state["v"].values())


def resume_and_run(arguments: dict[str, Any], directory: str) -> list[tuple[float, float]]:
    from megatron_opus.training import checkpoint

    config = recipe(**arguments)
    engine, groups = start(dataclasses.replace(config, seed=99))  # other weights and random states until loaded
    path = checkpoints.latest(Path(directory))
    assert path is not None
    state = checkpoint.load(engine, path, fingerprints=PRINTS, config=config)
    assert state["ids"].tolist() == [0, 1, 2]
    assert torch.equal(state["generator"], torch.Generator().manual_seed(5).get_state())
    return [*steps(engine, groups, 3, 6), (random.random(), float(np.random.rand())), second_moments(engine)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"zero": 0, "model": DROPOUT},
        {"zero": 1},
        {"zero": 2, "tp": 2, "model": DROPOUT},
        {"zero": 1, "tp": 2, "sp": True, "model": DROPOUT},
        {"zero": 0, "precision": "bf16"},
        {"zero": 1, "precision": "bf16"},
        {"zero": 2, "precision": "bf16", "tp": 2},
        {"zero": 3},
        {"zero": 3, "precision": "bf16", "tp": 2, "model": DROPOUT},
        {"zero": 2, "offload": "cpu"},
        {"zero": 3, "offload": "cpu", "precision": "bf16"},
        {"zero": 0, "optimizer": "sgd", "precision": "bf16"},
        {"zero": 3, "optimizer": "sgd"},
        *({"zero": zero, "optimizer": "muon", "kind": "adamw"} for zero in (0, 1, 2, 3)),
        *({"zero": zero, "optimizer": "muon", "kind": "adamw", "precision": "bf16"} for zero in (0, 1, 2, 3)),
        {"zero": 2, "optimizer": "muon", "kind": "adamw", "offload": "cpu"},
        {"zero": 3, "optimizer": "muon", "kind": "adamw", "offload": "cpu", "precision": "bf16"},
    ],
    ids=lambda a: "-".join(str(v) for k, v in a.items() if k != "model"),
)
def test_resumed_run_is_bit_identical(world2: Any, tmp_path: Path, arguments: dict[str, Any]) -> None:
    """State that is not saved (a tracker's dropout state, fp32 masters, the schedule) shows in the next loss."""
    saved = world2.run(run_and_save, arguments, str(tmp_path))
    assert world2.run(resume_and_run, arguments, str(tmp_path)) == saved


def save_three(directory: str) -> list[str]:

    config = recipe()
    engine, _ = start(config)
    for step in (1, 2, 3):
        save_now(engine, directory, config, step, keep=2)
    save_now(engine, directory, config, 3, keep=2)
    return [path.name for path in checkpoints.complete(Path(directory))]


def test_a_complete_checkpoint_is_never_written_into(world2: Any, tmp_path: Path) -> None:
    """Killed while it saves a step for the second time, a run would have no checkpoint of it at all."""
    assert world2.run(save_three, str(tmp_path)) == [["step_00000003", "step_00000003.1"]] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000003.1"]


def save_again(directory: str) -> str:

    config = recipe()
    engine, _ = start(config)
    save_now(engine, directory, config, 2)
    return str(checkpoints.latest(Path(directory)))


def leave_incomplete(path: Path) -> None:
    (path / "engine").mkdir(parents=True)
    (path / "engine" / "mp_rank_00_model_states.pt").write_bytes(b"half")
    (path / "complete.json.1.partial").write_text("{")


def test_incomplete_checkpoint_is_ignored(world2: Any, tmp_path: Path) -> None:
    """A directory left by a killed save taken for a checkpoint: the resumed run starts from half of one."""
    world2.run(save_again, str(tmp_path))
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000001")
    leave_incomplete(tmp_path / "step_00000002")
    leave_incomplete(tmp_path / "step_00000009")

    assert checkpoints.latest(tmp_path) == tmp_path / "step_00000001"
    with pytest.raises(CheckpointError, match=r"never finished; last complete one: .*step_00000001"):
        checkpoints.read_marker(tmp_path / "step_00000009")
    assert world2.run(save_again, str(tmp_path)) == [str(tmp_path / "step_00000002")] * 2
    assert (tmp_path / "step_00000009").is_dir()


def refused(arguments: dict[str, Any], directory: str, prints: dict[str, str], change: dict[str, Any]) -> str:
    """The error of a resume that does not fit, after a look whether it touched the weights."""
    from megatron_opus.training import checkpoint

    config = recipe(**arguments)
    engine, _ = start(config)
    before = [p.detach().clone() for p in engine.module.parameters()]
    other = dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **keys) for section, keys in change.items()}
    )
    path = checkpoints.latest(Path(directory))
    assert path is not None
    try:
        checkpoint.load(engine, path, fingerprints=prints, config=other)
    except CheckpointError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
        return str(error)
    return ""


@pytest.fixture(scope="module")
def saved(world2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    world2.run(save_again, str(directory))
    return directory


@pytest.mark.parametrize(
    ("arguments", "prints", "change", "expected"),
    [
        ({"tp": 2}, PRINTS, {}, ["layout.tensor_model_parallel_size: saved 1, now 2", "layout.data_parallel_size"]),
        ({}, {**PRINTS, "data": "other"}, {}, ["fingerprint.data: saved 'abc', now 'other'"]),
        ({"zero": 2}, PRINTS, {}, ["parallel.zero_stage: saved 1, now 2"]),
        (
            {},
            PRINTS,
            {"optimizer": {"lr": 0.5}, "model": {"rotary_base": 5}},
            ["optimizer.lr: saved 0.01, now 0.5", "model.rotary_base: saved 10000, now 5"],
        ),
        (
            {},
            PRINTS,
            {"training": {"train_steps": 40}},
            ["optimizer.lr_decay_steps: saved 20, now 40", "to train on"],
        ),
    ],
    ids=["layout", "data", "zero", "model and schedule", "length"],
)
def test_a_checkpoint_of_another_run_is_refused(
    world2: Any, saved: Path, arguments: dict[str, Any], prints: dict[str, str], change: dict[str, Any], expected: Any
) -> None:
    """A resume with other data or another schedule goes on quietly and is no longer the run it says it is."""
    for error in world2.run(refused, arguments, str(saved), prints, change):
        assert all(text in error for text in expected), error
        assert error.count("\n") <= len(expected) + 1, error


def test_what_may_change_between_runs(world2: Any, saved: Path) -> None:
    """Refusing another log interval makes people edit checkpoints by hand."""
    change = {
        "training": {"train_steps": 40, "log_interval": 7, "checkpoint_interval": 3},
        "optimizer": {"lr_decay_steps": 20},
        "parallel": {"distributed_timeout_minutes": 99.0},
    }
    assert world2.run(refused, {}, str(saved), PRINTS, change) == ["", ""]


def test_truncated_file(saved: Path, tmp_path: Path) -> None:
    """A file cut short by a full disk raises in the middle of loading, when half of the state is already replaced."""
    import shutil

    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    shutil.copytree(directory / "step_00000002", directory / "step_00000005")
    damaged = directory / "step_00000005"
    victim = next((damaged / "engine").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-10])
    (damaged / "rng_00001.pt").unlink()
    marker = checkpoints.read_marker(damaged)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.verify_files(damaged, marker)
    size = victim.stat().st_size
    assert f"expected {size + 10} bytes, got {size}" in str(caught.value)
    assert "rng_00001.pt" in str(caught.value)
    assert "resume from" in str(caught.value)
    assert checkpoints.latest(directory) == damaged  # not passed over in silence
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoints.latest(directory, skip_damaged=True) == directory / "step_00000002"


def test_marker_is_plain_json(saved: Path) -> None:
    """What a checkpoint belongs to must be readable without this program."""
    marker = json.loads((saved / "step_00000002" / "complete.json").read_text())
    assert marker["step"] == 2
    assert marker["layout"] == {"world_size": 2, "tensor_model_parallel_size": 1, "data_parallel_size": 2}
    assert {"state.pt", "rng_00000.pt", "rng_00001.pt"} < set(marker["files"])


def one_rank_fails(directory: str) -> str:
    import torch.distributed as dist

    from megatron_opus.training import checkpoint

    config = recipe()
    engine, _ = start(config)
    original = checkpoint._rng_states
    if dist.get_rank() == 1:
        checkpoint._rng_states = lambda: {"unpicklable": (lambda: None)}
    try:
        save_now(engine, directory, config, 4)
    except CheckpointError as error:
        return str(error)
    finally:
        checkpoint._rng_states = original
    return ""


def test_a_rank_that_cannot_write_stops_all(world2: Any, tmp_path: Path) -> None:
    """The others would wait for it in the next collective until the timeout, and then show the wrong error."""
    errors = world2.run(one_rank_fails, str(tmp_path))
    assert errors[0] == errors[1]
    assert "pickle" in errors[0].lower()
    assert not list(tmp_path.glob("*/complete.json"))
