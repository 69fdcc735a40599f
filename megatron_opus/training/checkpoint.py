"""Checkpoints that a killed process cannot spoil.

    <directory>/step_00000500/
        engine/            DeepSpeed: weights, optimizer state, schedule
        state.pt           what the loop gave: buffer, generators, counters; the same on every rank
        rng_00000.pt ..    random states of each rank
        moment_00000.pt .. each rank's part of the selector's own second moment, where it keeps one
        complete.json      written last: step, layout, configuration, fingerprints, environment, and the size of every
                           file above

A directory without `complete.json` is not a checkpoint. It is ignored, and removed only when the same step is saved
again. A complete one is never written into: a second save of its step goes beside it (`step_00000500.1`). Ranks must
see one file system.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_opus.backends.megatron import rng_tracker
from megatron_opus.config import RunConfig, to_dict
from megatron_opus.training.agreement import environment

MARKER = "complete.json"
DELETING = "deleting.json"  # a marker withdrawn: what is left of the directory may go
FORMAT = 1

# Keys that may differ between the run that saved and the run that resumes: they decide what is printed, written and
# tolerated, or say where things lie (the data itself is compared by its fingerprint), not what is computed.
FREE_KEYS = frozenset(
    {
        "output_dir",
        "name",
        "data.path",
        "data.cache_dir",
        "parallel.distributed_timeout_minutes",
        "training.train_steps",  # the schedule's length is compared as optimizer.lr_decay_steps
        "training.eval_interval",
        "training.eval_sequences",
        "training.checkpoint_interval",
        "training.keep_checkpoints",
        "training.log_interval",
        "training.tensorboard",
        "training.exit_duration_minutes",
        "training.max_nonfinite_steps",
        "selection.max_fallbacks",
        "selection.debug_checks",
    }
)


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, absent, or of another run."""


def save(
    engine: Any,
    directory: Path,
    *,
    step: int,
    state: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    config: RunConfig,
    keep: int,
) -> Path:
    """Write one checkpoint and drop all but the last `keep` complete ones. Collective; the path on every rank.

    `state` must be the same on every rank: only rank 0's is written. Earlier checkpoints stay as they were when this
    one fails. Raises CheckpointError on every rank when a rank could not write its part; a failure inside DeepSpeed's
    own writing raises on that rank alone, whose process must then end so that the launcher ends the others.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    moment = engine.step_settings.second_moment
    path = _shared(lambda: _new_directory(directory, step))
    engine.save_checkpoint(str(path), tag="engine", save_latest=False)

    def write_local() -> None:
        if rank == 0:
            torch.save(dict(state), path / "state.pt")
        torch.save(_rng_states(), path / f"rng_{rank:05d}.pt")
        if moment is not None:
            torch.save(moment.state_dict(), path / f"moment_{rank:05d}.pt")

    _everywhere(write_local)

    def mark_complete() -> Path:
        kinds = ("rng",) if moment is None else ("rng", "moment")
        missing = [r for r in range(world) if not all((path / f"{k}_{r:05d}.pt").is_file() for k in kinds)]
        if missing:
            raise CheckpointError(
                f"checkpoint {path}: files of ranks {missing} are not visible to rank 0; "
                "output_dir must lie on a file system that all nodes share"
            )
        marker = {
            "format": FORMAT,
            "step": step,
            "layout": _layout(engine),
            "config": to_dict(config),
            "fingerprints": dict(fingerprints),
            "versions": _versions(),
            "environment": environment(),  # for the reader: never compared
            "files": _synced_files(path),
        }
        _replace(path / MARKER, json.dumps(marker, indent=1, sort_keys=True))
        _prune(directory, keep)
        return path

    return _shared(mark_complete)


def load(engine: Any, path: Path, *, fingerprints: Mapping[str, str], config: RunConfig) -> dict[str, Any]:
    """Restore engine and random states from one complete checkpoint; the `state` it was saved with. Collective.

    Everything is compared before anything is changed. Raises CheckpointError listing the keys that differ, or the
    files that are missing or truncated.
    """
    _everywhere(lambda: check(path, layout=_layout(engine), fingerprints=fingerprints, config=config))
    loaded, _ = engine.load_checkpoint(str(path), tag="engine")
    if loaded is None:
        raise CheckpointError(f"checkpoint {path}: DeepSpeed found nothing to load in {path / 'engine'}")
    for group, lr in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    moment = engine.step_settings.second_moment
    if moment is not None:
        moment.load_state_dict(torch.load(path / f"moment_{dist.get_rank():05d}.pt", map_location="cpu"))
    # Written by this program with numpy arrays and generator states in it: not a file to take from a stranger.
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=False)
    _restore_rng(torch.load(path / f"rng_{dist.get_rank():05d}.pt", map_location="cpu", weights_only=False))
    return state


def check(
    path: Path, *, layout: Mapping[str, Any], fingerprints: Mapping[str, str], config: RunConfig
) -> dict[str, Any]:
    """The marker of a checkpoint that this run may resume from. Reads only. Raises CheckpointError."""
    marker = read_marker(path)
    if marker["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path}: expected format {FORMAT}, got {marker['format']}")
    verify_files(path, marker)
    saved, asked = _comparable(marker["config"]), _comparable(to_dict(config))
    differences = _differences("", saved, asked)
    differences += _differences("layout.", marker["layout"], dict(layout))
    differences += _differences("fingerprint.", marker["fingerprints"], dict(fingerprints))
    if differences:
        lines = "\n".join(f"  {key}: saved {old!r}, now {new!r}" for key, old, new in differences)
        hint = ""
        if any(key == "optimizer.lr_decay_steps" for key, _, _ in differences):
            steps = saved["optimizer.lr_decay_steps"]
            hint = f"\nThe schedule of this run ends at step {steps}"
            if saved["optimizer.min_lr"] > 0:
                hint += f"; to train on at optimizer.min_lr, set optimizer.lr_decay_steps={steps}"
            else:
                hint += " with rate 0; a run that is to go on longer needs optimizer.min_lr above 0 from its start"
        raise CheckpointError(f"checkpoint {path} belongs to another run; these must be equal:\n{lines}{hint}")
    versions = [f"{k} {v} (now {_versions().get(k)})" for k, v in marker["versions"].items() if _versions().get(k) != v]
    if versions:
        warnings.warn(
            f"checkpoint {path} was saved with {', '.join(versions)}: the run goes on, but perhaps not bit for bit",
            stacklevel=2,
        )
    return marker


def latest(directory: Path, *, skip_damaged: bool = False) -> Path | None:
    """The newest complete checkpoint, or None. `skip_damaged`: pass over complete ones whose files are not all there.

    Without it a damaged newest checkpoint is returned, and refused by `check`: going back is the user's decision.
    """
    for path in reversed(complete(directory)):
        if skip_damaged:
            try:
                verify_files(path, read_marker(path))
            except CheckpointError as error:
                warnings.warn(f"passed over: {error}", stacklevel=2)
                continue
        return path
    return None


def shared_latest(directory: Path) -> Path | None:
    """`latest` as rank 0 sees it, on every rank: on a network file system each might see another one. Collective."""
    found: Path | None = _shared(lambda: latest(directory))
    return found


def complete(directory: Path) -> list[Path]:
    """Complete checkpoints under `directory`, oldest first."""
    found = []
    if directory.is_dir():
        for path in directory.iterdir():
            key = _order(path)
            if key is not None and (path / MARKER).is_file():
                found.append((key, path))
    return [path for _, path in sorted(found)]


def read_marker(path: Path) -> dict[str, Any]:
    """Contents of `complete.json`. Raises CheckpointError when the checkpoint is incomplete or the file is broken."""
    try:
        return json.loads((path / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = complete(path.parent)
        last = found[-1] if found else "none"
        raise CheckpointError(
            f"checkpoint {path}: no {MARKER}, it was never finished; last complete one: {last}"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"checkpoint {path}: {MARKER} is not valid JSON ({error})") from error


def verify_files(path: Path, marker: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless every file of the checkpoint is there with the size it was saved with."""
    damaged = []
    for name, size in marker["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            damaged.append(f"  {name}: expected {size} bytes, got {'no file' if found is None else found}")
    if damaged:
        others = [str(p) for p in complete(path.parent) if p != path]
        remedy = f"resume from {others[-1]} instead, if that is wanted" if others else "there is no other one to go to"
        raise CheckpointError(f"checkpoint {path} is damaged; {remedy}:\n" + "\n".join(damaged))


# --- random states --------------------------------------------------------------------------------------------------


def _rng_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": rng_tracker().get_states(),
    }


def _restore_rng(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    rng_tracker().set_states(dict(states["megatron"]))


# --- comparing ------------------------------------------------------------------------------------------------------


def _layout(engine: Any) -> dict[str, Any]:
    groups = engine.step_settings.groups
    return {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": groups.tp_size,
        "data_parallel_size": groups.dp_size,
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "megatron-core")}


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys that must be equal; an open schedule length is that of the run."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Mapping[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    walk("", config)
    if flat["optimizer.lr_decay_steps"] is None:
        flat["optimizer.lr_decay_steps"] = flat["training.train_steps"]
    # a checkpoint makes the next step read the preconditioner anew: with a longer refresh, when matters
    bound = {"training.checkpoint_interval"} if flat["selection.preconditioner.refresh_every"] > 1 else set()
    return {key: value for key, value in flat.items() if key not in FREE_KEYS - bound}


def settings_that_differ(saved: Mapping[str, Any], config: RunConfig) -> list[tuple[str, Any, Any]]:
    """(key, saved, now) where a run recorded with `saved` (nested, as config.yaml has it) cannot be this one."""
    return _differences("", _comparable(saved), _comparable(to_dict(config)))


def _differences(prefix: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = sorted({*saved, *now})
    absent = "absent"
    return [
        (f"{prefix}{key}", saved.get(key, absent), now.get(key, absent))
        for key in keys
        if saved.get(key, absent) != now.get(key, absent)
    ]


# --- files ----------------------------------------------------------------------------------------------------------


def _order(path: Path) -> tuple[int, int] | None:
    match = re.fullmatch(r"step_(\d+)(?:\.(\d+))?", path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _new_directory(directory: Path, step: int) -> Path:
    """An empty directory for this step; what an interrupted save of the same step left behind is removed."""
    attempt = 0
    while True:
        path = directory / (f"step_{step:08d}" + (f".{attempt}" if attempt else ""))
        if not (path / MARKER).is_file():
            break
        attempt += 1
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def _synced_files(path: Path) -> dict[str, int]:
    """Relative name -> size of every file, flushed to the disk: the marker must not outlive what it vouches for."""
    sizes = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[file.relative_to(path).as_posix()] = file.stat().st_size
    return sizes


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(directory: Path, keep: int) -> None:
    """Keep the last `keep` (at least one) complete checkpoints. Withdraw the marker first, then the files."""
    for path in complete(directory)[: -max(1, keep)]:
        os.replace(path / MARKER, path / DELETING)
    for path in directory.iterdir():
        if _order(path) is not None and (path / DELETING).is_file() and not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)


def _everywhere(action: Any) -> None:
    """Run on every rank; when it raises on one, every rank raises, and none is left waiting for the others."""
    error = ""
    try:
        action()
    except Exception as exception:
        error = f"rank {dist.get_rank()}: {type(exception).__name__}: {exception}"
    errors: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    failed = [e for e in errors if e]
    if failed:
        raise CheckpointError("\n".join(dict.fromkeys(e.split(": ", 1)[1] for e in failed)))


def _shared(action: Any) -> Any:
    """Run on rank 0, its result on every rank; an error is raised on every rank."""
    outcome: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as exception:
            outcome[1] = f"{type(exception).__name__}: {exception}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise CheckpointError(outcome[1])
    return outcome[0]
