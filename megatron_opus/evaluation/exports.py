"""The Hugging Face directory of one checkpoint, made once and used again as long as it is of that checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opus.config import RunConfig
from megatron_opus.data.tokenizers.hf_export import TOKENIZER_FILE
from megatron_opus.evaluation.prompts import EvaluationError
from megatron_opus.files import locked
from megatron_opus.runs import checkpoints
from megatron_opus.weights.convert import ORIGIN, opus_to_hf
from megatron_opus.weights.sources import checkpoint_config

DIRECTORY = "exported"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model that transformers can load, and the checkpoint that it was made from."""

    directory: Path
    checkpoint: Path
    config: RunConfig
    marker: dict[str, Any]
    reused: bool

    @property
    def step(self) -> int:
        return int(self.marker["step"])


def find_checkpoint(run_dir: Path, step: int | None) -> Path:
    """The newest complete checkpoint of a run, or the newest one of `step`. Raises EvaluationError."""
    found = checkpoints.complete(run_dir / "checkpoints")
    if not found:
        raise EvaluationError(
            f"{run_dir / 'checkpoints'}: expected a complete checkpoint, found none; a run writes one at its end and "
            "every training.checkpoint_interval steps"
        )
    if step is None:
        return found[-1]
    of_step = [path for path in found if checkpoints.read_marker(path)["step"] == step]
    if not of_step:
        there = ", ".join(str(checkpoints.read_marker(path)["step"]) for path in found)
        raise EvaluationError(f"{run_dir}: no complete checkpoint of step {step}; there are those of steps {there}")
    return of_step[-1]


def export(
    run_dir: Path, step: int | None, *, tokenizer: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> Exported:
    """`run_dir`/exported/NAME-OF-CHECKPOINT, made when it is absent or of other files.

    Two evaluations at once make it once. A killed one leaves nothing that looks like a model. Raises EvaluationError
    and what opus_to_hf raises.
    """
    path = find_checkpoint(run_dir, step)
    config, marker = checkpoint_config(path)
    origin = {"checkpoint": path.name, "step": marker["step"], **_identity(path), "tokenizer": str(tokenizer or "")}
    directory = run_dir / DIRECTORY / path.name
    directory.parent.mkdir(exist_ok=True)
    with locked(directory.parent / "lock"):
        # Without a tokenizer the data was away when it was exported: it may be back.
        reused = _origin(directory) == origin and (directory / TOKENIZER_FILE).is_file()
        if reused:
            say(f"{directory}: exported already")
        else:
            if directory.exists() and _origin(directory) is None:
                raise EvaluationError(f"{directory}: exists and is not an export of this program; move it away")
            say(f"exporting {path} to {directory}")
            done = opus_to_hf(path, directory, tokenizer=tokenizer, overwrite=directory.exists(), origin=origin)
            if done.notice:
                say(done.notice)
    return Exported(directory=directory, checkpoint=path, config=config, marker=marker, reused=reused)


def _identity(path: Path) -> dict[str, Any]:
    """Of the checkpoint's files as they are now: a run that was deleted and made again has the same names."""
    marker = path / checkpoints.MARKER
    return {"sha256": hashlib.sha256(marker.read_bytes()).hexdigest(), "saved_ns": marker.stat().st_mtime_ns}


def _origin(directory: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((directory / ORIGIN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
