"""What one node finds out about itself before ranks start on it. Nothing here talks to other nodes.

The GPU part has not run on a GPU yet: it is torch's and nvidia-smi's documented interface, tested with a stand-in.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Protocol

GIB = 2**30
PROBE = 256  # width of the matrices that each GPU multiplies


class Needs(Protocol):
    """The part of `health.Expected` that a node can answer for itself."""

    @property
    def imports(self) -> tuple[str, ...]: ...
    @property
    def output_dir(self) -> Path: ...
    @property
    def gpus(self) -> int: ...
    @property
    def min_gpu_free(self) -> float: ...
    @property
    def min_disk_gib(self) -> float: ...


def report(name: str, needs: Needs) -> dict[str, Any]:
    """Plain values: `faults` in words, and the facts that the first node compares."""
    faults = import_faults(needs.imports)
    software: dict[str, str] = {}
    if not faults:
        try:
            from megatron_opus.ranks.agreement import software as versions

            software = versions()
        except Exception as error:  # a package without metadata, a file that cannot be read
            faults.append(f"megatron_opus cannot be used: {type(error).__name__}: {error}")
    disk_gib, disk = disk_faults(needs.output_dir, needs.min_disk_gib)
    faults += disk
    gpus: list[dict[str, Any]] = []
    if needs.gpus and not faults:
        gpus, broken = gpu_faults(needs.gpus, needs.min_gpu_free)
        faults += broken
    return {
        "node": name,
        "host": os.uname().nodename,
        "faults": faults,
        "software": software,
        "disk_free_gib": disk_gib,
        "gpus": gpus,
        "clock_offset": 0.0,
        "round_trip": 0.0,
    }


def import_faults(names: tuple[str, ...]) -> list[str]:
    """Imports each package, as the ranks will; what it says where it cannot."""
    faults = []
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as error:  # a broken extension may raise anything, even SystemExit
            faults.append(f"cannot import {name}: {type(error).__name__}: {error}")
    return faults


def disk_faults(output_dir: Path, min_gib: float) -> tuple[float, list[str]]:
    """Free GiB for this user where `output_dir` is or will be, and what is wrong with it."""
    existing = output_dir.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free / GIB
    faults = []
    if not os.access(existing, os.W_OK):
        faults.append(f"{existing}: cannot be written to, and output_dir is {output_dir}")
    if free < min_gib:
        faults.append(f"{existing}: {free:.1f} GiB free, expected {min_gib:g} (MIN_DISK_GIB)")
    return free, faults


def gpu_faults(expected: int, min_free: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Every visible GPU with its free memory and the result of a multiplication; what is wrong with them."""
    import torch

    count = torch.cuda.device_count()
    if count != expected:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        return [], [f"expected {expected} GPUs, found {count} (CUDA_VISIBLE_DEVICES: {visible})"]
    found, faults = [], []
    for index in range(count):
        try:
            free, total = torch.cuda.mem_get_info(index)
            ones = torch.ones(PROBE, PROBE, device=f"cuda:{index}")
            product = float((ones @ ones).sum().item())
        except RuntimeError as error:
            faults.append(f"GPU {index} does not work: {str(error).splitlines()[0]}")
            continue
        found.append({"name": torch.cuda.get_device_name(index), "free_gib": free / GIB, "total_gib": total / GIB})
        if product != PROBE**3:
            faults.append(f"GPU {index} multiplies wrongly: expected {PROBE**3}, got {product:g}")
        if free < min_free * total:
            faults.append(
                f"GPU {index}: {free / GIB:.1f} of {total / GIB:.1f} GiB free, expected at least {min_free:.0%} "
                "(MIN_GPU_FREE); is another process on it?"
            )
    names = [str(gpu["name"]) for gpu in found]
    if len(set(names)) > 1:
        faults.append(f"its GPUs differ: {', '.join(names)}")
    return found, faults + slowed_down(os.environ.get("PATH", ""))


def slowed_down(path: str) -> list[str]:
    """GPUs whose clocks the hardware holds down (heat, power supply): one of them slows all ranks."""
    tool = shutil.which("nvidia-smi", path=path)
    if tool is None:  # containers often have none: the other checks have used the GPUs
        return []
    fields = "index,clocks_throttle_reasons.hw_slowdown,clocks.sm,clocks.max.sm"
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi failed: {error}"]
    faults = []
    for line in said.splitlines():
        index, slowdown, now, most = (part.strip() for part in line.split(","))
        if slowdown == "Active":
            faults.append(f"GPU {index}: the hardware holds its clock down ({now} of {most})")
    return faults
