"""Checkpoints that a killed process cannot spoil.

    <directory>/step_00000500/
        engine/            the engine's own files: weights, optimizer state, schedule
        state.pt           what the loop gave: buffer, generators, counters; the same on every rank
        rng_00000.pt ..    random states of each rank
        moment_00000.pt .. each rank's part of the selector's own second moment, where it keeps one
        complete.json      written last: step, layout, configuration, fingerprints, environment, a hash of this
                           package's source, size and SHA-256 of every file above

A directory without `complete.json` is not a checkpoint. It is ignored, and removed only when the same step is saved
again. A complete one is never written into: a second save of its step goes beside it (`step_00000500.1`). Ranks must
see one file system.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_opus.backends.formats.torch_files import load_plain, pickles_below, refuse_code
from megatron_opus.backends.model.parallel import rng_tracker
from megatron_opus.config import RunConfig, to_dict
from megatron_opus.errors import CheckpointError
from megatron_opus.files import explain, write_json
from megatron_opus.ranks.agreement import environment, gathered, on_all_ranks, on_rank_0, software
from megatron_opus.runs.checkpoints import (
    DELETING,
    FORMAT,
    MARKER,
    _order,
    _versions,
    check,
    complete,
    latest,
    sha256_of,
    verify_contents,
)
from megatron_opus.types import TrainEngine

T = TypeVar("T")
SOURCE = "megatron_opus source"  # of ranks.agreement.software


def save(
    engine: TrainEngine,
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
    one fails. Raises CheckpointError on every rank when a rank could not write its part; a failure inside the
    engine's own writing raises on that rank alone, whose process must then end so that the launcher ends the others.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    own = engine.rank_state()
    path = on_rank_0(lambda: _explained(directory, lambda: _new_directory(directory, step)))
    engine.save(path)

    def write_local() -> None:
        if rank == 0:
            torch.save(dict(state), path / "state.pt")
        torch.save(_rng_states(), path / f"rng_{rank:05d}.pt")
        if own is not None:
            torch.save(own, path / f"moment_{rank:05d}.pt")

    on_all_ranks(lambda: _explained(path, write_local))
    names: list[str] = on_rank_0(lambda: sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()))
    # every rank flushes and digests a share of all files, whichever rank wrote them
    digests = gathered(lambda: _synced(path, names[rank::world]))

    def mark_complete() -> Path:
        kinds = ("rng",) if own is None else ("rng", "moment")
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
            "source": software()[SOURCE],
            "files": {name: (path / name).stat().st_size for name in names},
            "sha256": {name: digest for of_rank in digests for name, digest in of_rank.items()},
        }
        write_json(path / MARKER, marker)
        _prune(directory, keep)
        return path

    return on_rank_0(lambda: _explained(path, mark_complete))


def load(
    engine: TrainEngine,
    path: Path,
    *,
    fingerprints: Mapping[str, str],
    config: RunConfig,
    verify: bool = True,
    trust: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Restore engine and random states from one complete checkpoint; return the `state` it was saved with. Collective.

    Everything is compared before anything is changed: settings, sizes, and with `verify` the contents of all files,
    which the ranks divide among themselves. Files that the host's library unpickles by itself are looked through for
    anything that could run code, unless the user says that he trusts this checkpoint. Raises CheckpointError listing
    the keys that differ, or the files that are missing, truncated, changed or not to be trusted.
    """
    rank, share, layout = dist.get_rank(), (dist.get_rank(), dist.get_world_size()), _layout(engine)
    source = software()[SOURCE]

    def examine() -> list[Any]:
        marker = check(path, layout=layout, fingerprints=fingerprints, config=config)
        if marker.get("source", source) != source:
            say(
                f"warning: {path.name} was saved by other code of megatron_opus (source {marker['source']}, now "
                f"{source}): the run goes on, but perhaps not with the same numbers"
            )
        if not trust:
            refuse_code(pickles_below(path / "engine")[share[0] :: share[1]])
        if verify:
            started = time.perf_counter()
            verify_contents(path, marker, share)
            size, seconds = sum(marker["files"].values()) / 2**30, time.perf_counter() - started
            if "sha256" in marker:
                say(f"verified the contents of {path.name}: {size:.2f} GiB in {seconds:.1f} s (--no-verify skips it)")
            else:
                say(f"{path.name} was saved by a release that recorded no digests: only its files' sizes are known")

        names = ["state.pt", f"moment_{rank:05d}.pt"]
        # on another number of data-parallel ranks, each keeps the random states that it was seeded with
        names += [f"rng_{rank:05d}.pt"] if marker["layout"] == layout else []
        return [load_plain(path / name) if (path / name).is_file() else None for name in names]

    state, moment, *random_states = on_all_ranks(examine)
    engine.load(path, moment)
    for states in random_states:
        _restore_rng(states)
    loaded: dict[str, Any] = state
    return loaded


def shared_latest(directory: Path) -> Path | None:
    """`latest` as rank 0 sees it, on every rank: on a network file system each might see another one. Collective."""
    found: Path | None = on_rank_0(lambda: latest(directory))
    return found


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


def _layout(engine: TrainEngine) -> dict[str, Any]:
    groups = engine.groups
    layout = {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": groups.tp_size,
        "data_parallel_size": groups.dp_size,
    }
    more = {"pipeline_model_parallel_size": groups.pp_size, "expert_model_parallel_size": groups.ep_size}
    return layout | {key: size for key, size in more.items() if size > 1}


# --- files ----------------------------------------------------------------------------------------------------------


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


def _explained(folder: Path, write: Callable[[], T]) -> T:
    """Run `write`. Raises CheckpointError, with the remedy, where the disk below `folder` refuses it."""
    try:
        return write()
    except (OSError, RuntimeError) as error:
        if why := explain(error, folder):
            raise CheckpointError(f"the checkpoint could not be written: {why}") from error
        raise


def _synced(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Flush files to the disk and digest them: the marker must not outlive what it vouches for.

    A file that another rank wrote and this one cannot see is left out; `save` then names its rank.
    """
    seen = [name for name in names if (path / name).is_file()]
    for name in seen:
        with (path / name).open("rb") as handle:
            os.fsync(handle.fileno())
    return sha256_of(path, seen)


def _prune(directory: Path, keep: int) -> None:
    """Keep the last `keep` (at least one) complete checkpoints. Withdraw the marker first, then the files."""
    for path in complete(directory)[: -max(1, keep)]:
        os.replace(path / MARKER, path / DELETING)
    for path in directory.iterdir():
        if _order(path) is not None and (path / DELETING).is_file() and not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)
