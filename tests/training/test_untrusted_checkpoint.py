"""Checkpoints that somebody else has touched: changed bytes, and files that would run code when they are loaded."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_runs import recipe, start, steps
from test_checkpoint import PRINTS, save_now

from megatron_opus.errors import CheckpointError
from megatron_opus.runs import checkpoints


class Payload:
    """Runs code when it is unpickled: it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def write_zip(path: Path, proof: Path) -> None:
    torch.save({"module": Payload(proof), "state": Payload(proof)}, path)


def write_pickle(path: Path, proof: Path) -> None:
    path.write_bytes(pickle.dumps({"module": Payload(proof)}))


def saved(arguments: dict[str, Any], directory: str) -> None:
    config = recipe(**arguments)
    engine, groups = start(config)
    steps(engine, groups, 0, 2)
    save_now(engine, directory, config, 2, generator=torch.Generator().get_state())


def attempt(arguments: dict[str, Any], path: str, options: dict[str, Any]) -> str:
    """What loading says; empty when it loads."""
    from megatron_opus.training import checkpoint

    config = recipe(**arguments)
    engine, _ = start(config)
    try:
        checkpoint.load(engine, Path(path), fingerprints=PRINTS, config=config, **options)
    except CheckpointError as error:
        return str(error)
    return ""


ARGUMENTS = {"zero": 1, "optimizer": "muon", "kind": "adamw"}  # every kind of file: moments too


@pytest.fixture(scope="module")
def made(world2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trusted")
    world2.run(saved, ARGUMENTS, str(directory))
    path = checkpoints.latest(directory)
    assert path is not None
    return path


def names(made: Path) -> list[str]:
    return sorted(p.relative_to(made).as_posix() for p in made.rglob("*.pt"))


@pytest.mark.parametrize("write", [write_zip, write_pickle])
def test_a_payload_in_any_file_does_not_run(
    world2: Any, made: Path, tmp_path: Path, write: Callable[[Path, Path], None]
) -> None:
    """Guards against a checkpoint from elsewhere that runs code as the user who resumes from it.

    The digests are those of the planted file: whoever can change one can change the other.
    """
    assert len(names(made)) >= 8  # weights, optimizer states, random states, moments, the loop's state
    for name in names(made):
        path, proof = tmp_path / "planted" / made.name, tmp_path / "it_ran"
        shutil.copytree(made, path)
        write(path / name, proof)
        marker = json.loads((path / checkpoints.MARKER).read_text())
        marker["files"][name] = (path / name).stat().st_size
        marker["sha256"][name] = checkpoints.sha256_of(path, [name])[name]
        (path / checkpoints.MARKER).write_text(json.dumps(marker))
        said = world2.run(attempt, ARGUMENTS, str(path), {})
        # a file of one rank is found by that rank, and every rank hears of it
        assert all(Path(name).name in text for text in said), (name, said)
        assert not proof.exists(), name
        shutil.rmtree(path.parent)


def test_a_payload_does_not_run_where_weights_are_taken_from_it(made: Path, tmp_path: Path) -> None:
    """Guards against the other door: `model.init_from` and conversion read the same files."""
    from megatron_opus.backends.formats.torch_files import load_plain

    for write in (write_zip, write_pickle):
        planted, proof = tmp_path / "weights.pt", tmp_path / "it_ran"
        write(planted, proof)
        with pytest.raises(CheckpointError, match=r"weights\.pt"):
            load_plain(planted)
        assert not proof.exists()


def test_a_payload_in_a_distributed_checkpoint_does_not_run(tmp_path: Path) -> None:
    """Guards against Megatron's format: `.metadata` is a plain pickle, and so is each object that is no tensor."""
    import torch.distributed.checkpoint as dcp

    from megatron_opus.backends.formats.torch_files import pickles_below, refuse_code

    proof = tmp_path / "it_ran"
    clean, planted = tmp_path / "clean", tmp_path / "planted"
    for folder, value in ((clean, [1, 2]), (planted, Payload(proof))):
        dcp.save({"weight": torch.ones(3), "other": value}, checkpoint_id=folder, no_dist=True)
    refuse_code(pickles_below(clean))
    with pytest.raises(CheckpointError, match=r"\.metadata: other: .*pathlib\.Path.*could run code"):
        refuse_code(pickles_below(planted))
    write_pickle(clean / ".metadata", proof)
    with pytest.raises(CheckpointError, match=r"\.metadata: .*pathlib\.Path\.touch|getattr.*could run code"):
        refuse_code(pickles_below(clean))
    assert not proof.exists()


def test_changed_bytes_are_found(world2: Any, made: Path, tmp_path: Path) -> None:
    """Guards against a flipped bit: the size is right, and the run goes on from other weights without a word."""
    path = tmp_path / made.name
    shutil.copytree(made, path)
    victim = next(path.glob("engine/*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    for text in world2.run(attempt, ARGUMENTS, str(path), {}):
        assert f"the contents of engine/{victim.name} are not those that were saved" in text


def test_the_whole_checkpoint_loads(world2: Any, made: Path) -> None:
    """Guards against an allow-list so short that it refuses what this program itself has written."""
    assert world2.run(attempt, ARGUMENTS, str(made), {}) == ["", ""]
    assert world2.run(attempt, ARGUMENTS, str(made), {"verify": False}) == ["", ""]
