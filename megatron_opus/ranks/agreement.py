"""Ranks that do not hold the same thing are found at start, by name, instead of in a collective that never ends."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_opus import __version__
from megatron_opus.errors import CheckpointError, Refusal
from megatron_opus.nested import flatten

T = TypeVar("T")
ABSENT = "absent"
MOST = 20  # differences that one error lists
REQUIRED = ("torch", "deepspeed", "megatron-core", "numpy")
OPTIONAL = ("transformer-engine", "apex")
# variables that libraries read by themselves and that change what is computed
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "NVTE_FLASH_ATTN",
    "NVTE_FUSED_ATTN",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
)


class RankMismatch(Refusal, RuntimeError):
    """A rank runs another configuration, other data, other code or another library version, or has other weights."""


class OtherRankFailed(Refusal, RuntimeError):
    """This rank is well, but another one could not do its part."""

    of_one_rank = True


def check_agreement(facts: Mapping[str, Any], *, peers: str = "") -> None:
    """Collective over all ranks. Raise RankMismatch on every rank, naming the ranks and what differs.

    facts: plain values; nested mappings become dotted keys, of which only those that differ are named. Each rank is
    compared with the first one that gives the same `peers`. A digest travels first, the facts only when it differs.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = flatten(facts)
    digest = hashlib.sha256(repr(sorted((k, repr(v)) for k, v in mine.items())).encode()).hexdigest()
    digests = _gather((peers, digest))
    reference: dict[str, int] = {}
    for rank, (label, _) in enumerate(digests):
        reference.setdefault(label, rank)
    if all(theirs == digests[reference[label]][1] for label, theirs in digests):
        return
    everyone: list[dict[str, Any]] = _gather(mine)
    found: dict[tuple[str, str, str], list[int]] = {}
    for rank, (label, _) in enumerate(digests):
        first = reference[label]
        for key in sorted({*everyone[rank], *everyone[first]}):
            theirs, expected = (repr(everyone[r][key]) if key in everyone[r] else ABSENT for r in (rank, first))
            if theirs != expected:
                found.setdefault((key, theirs, f"rank {first} has {expected}"), []).append(rank)
    lines = [f"{_ranks(ranks)}: {key} is {theirs}, {expected}" for (key, theirs, expected), ranks in found.items()]
    if len(lines) > MOST:
        lines[MOST:] = [f"and {len(lines) - MOST} more differences"]
    raise RankMismatch(
        "ranks disagree; every process must run the same code on the same files with the same settings:\n  "
        + "\n  ".join(lines)
    )


def together(action: Callable[[], T], doing: str) -> T:
    """Run `action` on every rank. Where it raises on some, they raise their own error, all others OtherRankFailed.

    Collective; the action itself need not be. Without this the ranks that are well would wait for the others until the
    time of a collective is over, and say nothing about the cause.
    """
    result, failure, everyone = _attempt(action)
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
    if failed:
        raise OtherRankFailed(f"another rank failed while {doing}:\n  " + "\n  ".join(failed[:MOST]))
    return result  # type: ignore[return-value]


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank; when it raises on one, every rank raises the same CheckpointError. Collective."""
    result, _, everyone = _attempt(action)
    failed = [text for text in everyone if text]
    if failed:
        raise CheckpointError("\n".join(dict.fromkeys(failed)))
    return result  # type: ignore[return-value]


def gathered(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return all results in rank order; errors as in `on_all_ranks`. Collective."""
    return _gather(on_all_ranks(action))


def on_rank_0(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank; an error is raised on every rank. Collective."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        outcome[0], failure, _ = _attempt(action, alone=True)
        outcome[1] = None if failure is None else _said(failure)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    result: T = outcome[0]
    return result


def _attempt(action: Callable[[], T], *, alone: bool = False) -> tuple[T | None, Exception | None, list[str]]:
    """Run `action`: its result, its error, and what the errors of all ranks say (empty where there was none)."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    said = "" if failure is None else _said(failure)
    return result, failure, [said] if alone or not dist.is_initialized() else _gather(said)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def software() -> dict[str, str]:
    """Versions that decide what is computed, and a hash of this package's own source files."""
    found = {"python": platform.python_version(), "megatron_opus": __version__}
    found |= {name: importlib.metadata.version(name) for name in REQUIRED}
    for name in OPTIONAL:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ABSENT
    return {**found, "megatron_opus source": source_hash(Path(__file__).resolve().parent.parent)}


def source_hash(package: Path) -> str:
    """16 hexadecimal digits over names and contents of the package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """What else changes numbers: devices, their libraries, precision switches, variables. Not host names or paths."""
    facts: dict[str, Any] = {
        "world size": dist.get_world_size() if dist.is_initialized() else 1,
        "default dtype": str(torch.get_default_dtype()),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        **{name: os.environ.get(name, ABSENT) for name in VARIABLES},
    }
    if torch.cuda.is_available():
        facts |= {
            "device": torch.cuda.get_device_name(),
            "CUDA": torch.version.cuda,
            "NCCL": torch.cuda.nccl.version() if dist.is_nccl_available() else ABSENT,
            "bf16 reduced precision": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        }
    else:
        facts["device"] = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return facts


def weight_digests(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], sharded: Callable[[str], bool]
) -> tuple[dict[str, str], dict[str, str]]:
    """Parameter name -> digest of its bytes: those that every rank holds alike, and those for which `sharded(name)`.

    About a second for each GB: every byte counts, since a sum would not see two numbers that have changed places.
    """
    alike: dict[str, str] = {}
    cut: dict[str, str] = {}
    for name, parameter in parameters:
        values = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        (cut if sharded(name) else alike)[name] = hashlib.blake2b(values.data, digest_size=8).hexdigest()
    return alike, cut


def _gather(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
