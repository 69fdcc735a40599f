"""Read checkpoint folders: which are complete, whether their files are all there, whether a run may resume from one.

`training/checkpoint.py` writes them and describes what lies in one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from megatron_opus.config import RunConfig, to_dict, without_removed
from megatron_opus.data.prepare.records import file_sha256
from megatron_opus.errors import CheckpointError
from megatron_opus.nested import flatten

MARKER = "complete.json"
DELETING = "deleting.json"  # a marker withdrawn: what is left of the directory may go
FORMAT = 1
CHANGES_FILE = "changes.jsonl"  # of a run: settings that were changed at a resume, a line each: step, key, was, now


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


# Keys that may change at a resume and are recorded where they do: which domains the coming candidates are drawn from
# follows from them at every step anew, and no state depends on what they were.
RECORDED_KEYS = ("data.domain_weights", "data.domain_schedule", "data.domain_max_epochs")


def check(
    path: Path, *, layout: Mapping[str, Any], fingerprints: Mapping[str, str], config: RunConfig
) -> dict[str, Any]:
    """The marker of a checkpoint that this run may resume from. Reads only. Raises CheckpointError."""
    marker = read_marker(path)
    verify_files(path, marker)
    asked = _comparable(to_dict(config))
    try:
        saved = _comparable(marker["config"])
        has_floor = saved["optimizer.min_lr"] > 0
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MARKER}: config: damaged ({error}); {_other_one(path)}") from error
    differences = _differences("", saved, asked)
    # Megatron's engine writes tensors of the whole model, which any number of data-parallel ranks can read
    free = {"world_size", "data_parallel_size"} if config.parallel.engine == "megatron" else set()
    laid_out = ({key: value for key, value in x.items() if key not in free} for x in (marker["layout"], layout))
    differences += _differences("layout.", *laid_out)
    differences += _differences("fingerprint.", marker["fingerprints"], dict(fingerprints))
    if differences:
        lines = "\n".join(f"  {key}: saved {old!r}, now {new!r}" for key, old, new in differences)
        hint = ""
        if any(key == "optimizer.lr_decay_steps" for key, _, _ in differences):
            steps = saved["optimizer.lr_decay_steps"]
            hint = f"\nThe schedule of this run ends at step {steps}"
            if has_floor:
                hint += f"; to train on at optimizer.min_lr, set optimizer.lr_decay_steps={steps}"
            else:
                hint += " with rate 0; a run that is to go on longer needs optimizer.min_lr above 0 from its start"
        raise CheckpointError(
            f"checkpoint {path} belongs to another run, says its {MARKER}; these must be equal:\n{lines}{hint}"
        )
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
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = complete(path.parent)
        last = others[-1] if others else "none"
        raise CheckpointError(
            f"checkpoint {path}: no {MARKER}, it was never finished; last complete one: {last}"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"checkpoint {path}: {MARKER} is not valid JSON ({error}); {_other_one(path)}") from error
    if not isinstance(marker, dict) or marker.get("format") != FORMAT:
        told = marker.get("format") if isinstance(marker, dict) else type(marker).__name__
        raise CheckpointError(f"checkpoint {path}: {MARKER}: expected format {FORMAT}, got {told!r}")
    kinds = {"step": int, "layout": dict, "config": dict, "fingerprints": dict, "versions": dict, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(marker.get(key), kind):
            raise CheckpointError(
                f"checkpoint {path}: {MARKER}: {key}: expected {kind.__name__}, got {marker.get(key)!r}; "
                f"{_other_one(path)}"
            )
    digests = marker.get("sha256", {})
    names = [*marker["files"], *(digests if isinstance(digests, dict) else [".."])]
    if any(Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name for name in names):
        raise CheckpointError(
            f"checkpoint {path}: {MARKER}: expected the names of files below it, got {names[:5]}; {_other_one(path)}"
        )
    return marker


def verify_files(path: Path, marker: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless every file of the checkpoint is there with the size it was saved with."""
    damaged = []
    for name, size in marker["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            damaged.append(f"  {name}: expected {size} bytes, got {'no file' if found is None else found}")
    if damaged:
        raise CheckpointError(f"checkpoint {path} is damaged; {_other_one(path)}:\n" + "\n".join(damaged))


def sha256_of(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Compute the SHA-256 of files below `path`, several at a time (hashing leaves the interpreter's lock)."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(path / name), names), strict=True))


def verify_contents(path: Path, marker: Mapping[str, Any], share: tuple[int, int] = (0, 1)) -> None:
    """Raise CheckpointError where a file's contents are not those that were saved.

    `share` (i, n) reads every n-th file from the i-th on, largest files first, so that ranks divide the work. A
    checkpoint of a release that recorded no digests is passed over: its sizes are all that is known.
    """
    digests = marker.get("sha256", {})
    if missing := [name for name in digests if not (path / name).is_file()]:
        raise CheckpointError(f"checkpoint {path} is damaged: {missing[0]} is missing; {_other_one(path)}")
    names = sorted(digests, key=lambda name: (-(path / name).stat().st_size, name))[share[0] :: share[1]]
    found = sha256_of(path, names)
    changed = [name for name in names if found[name] != digests[name]]
    if changed:
        raise CheckpointError(
            f"checkpoint {path} is damaged: the contents of {', '.join(changed[:5])} are not those that were saved, "
            f"though the sizes are; {_other_one(path)}"
        )


def _other_one(path: Path) -> str:
    others = [str(p) for p in complete(path.parent) if p != path]
    return f"resume from {others[-1]} instead, if that is wanted" if others else "there is no other one to go to"


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "megatron-core")}


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys that must be equal; an open schedule length is that of the run."""
    flat = {**_defaults(), **flatten(without_removed(config))}
    if flat["optimizer.lr_decay_steps"] is None:
        flat["optimizer.lr_decay_steps"] = flat["training.train_steps"]
    # a checkpoint makes the next step read the preconditioner anew: with a longer refresh, when matters
    bound = {"training.checkpoint_interval"} if flat["selection.preconditioner.refresh_every"] > 1 else set()
    return {key: value for key, value in flat.items() if key not in FREE_KEYS - bound and not _recorded(key)}


def recorded_changes(saved: Mapping[str, Any], config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return (key, saved, now) of the mixture's settings that differ from those of a run recorded with `saved`."""
    then, now = ({**_defaults(), **flatten(x)} for x in (without_removed(saved), to_dict(config)))
    return _differences("", *({k: v for k, v in x.items() if _recorded(k)} for x in (then, now)))


def _recorded(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in RECORDED_KEYS)


def _defaults() -> dict[str, Any]:
    """Dotted keys with their defaults: a run of an earlier release has not recorded keys that are new since."""
    sections = {f.name: f.default_factory for f in fields(RunConfig) if f.default_factory is not MISSING}
    return flatten({name: asdict(made()) for name, made in sections.items()})


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


def _order(path: Path) -> tuple[int, int] | None:
    match = re.fullmatch(r"step_(\d+)(?:\.(\d+))?", path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None
