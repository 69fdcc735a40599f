"""Check, before anything is allocated, whether the recipe fits this machine, and which layouts would if it does not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed as dist

from megatron_opus.config import ConfigError, RunConfig, validate, validate_world
from megatron_opus.config.dimensions import tensor_parallel_degrees
from megatron_opus.errors import Refusal
from megatron_opus.estimates.flops import stage_shares
from megatron_opus.estimates.memory import GIB, MemoryEstimate, estimate, stage_estimates
from megatron_opus.estimates.schedule import idle
from megatron_opus.estimates.traffic import scoring_traffic
from megatron_opus.layout.parallel_layout import ParallelLayout, parallel_layout

MAX_RANKS = 1024  # the largest layout that is suggested
SUGGESTIONS = 5
STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)


class PreflightError(Refusal, RuntimeError):
    """Says what does not fit: bytes needed, bytes found, layouts that would fit. The run ends with a status not 0."""

    of_one_rank = True


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Holds the memory as found. On a CPU the ranks of one machine share it; each GPU has its own."""

    device: str  # "cpu" or "cuda"
    bytes_found: float  # free on the machine (cpu) or on this rank's GPU (cuda)
    local_ranks: int
    source: str  # where the number comes from

    def per_rank(self, local_ranks: int | None = None) -> float:
        """Give the bytes for each of `local_ranks` processes on one such machine."""
        return self.bytes_found / (local_ranks or self.local_ranks) if self.device == "cpu" else self.bytes_found


def look_up_machine() -> Machine:
    """Look up the free memory of this rank's device, the limits of its container respected."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))
        return Machine(device="cuda", bytes_found=float(free), local_ranks=local_ranks, source="free GPU memory")
    found, source = float(psutil.virtual_memory().available), "available memory"
    limit = container_headroom()
    if limit is not None and limit < found:
        found, source = limit, "what the container's memory limit leaves"
    return Machine(device="cpu", bytes_found=found, local_ranks=local_ranks, source=source)


def container_headroom(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Read the bytes left below the cgroup's memory limit (versions 2 and 1); None without a limit.

    Page cache counts as used there although it is given back on demand: inactive file pages are added again.
    """
    for limit_file, used_file, key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (root / limit_file).read_text().strip()
            used = int((root / used_file).read_text())
            statistics = (root / used_file).with_name("memory.stat").read_text()
        except (OSError, ValueError):
            continue
        if limit == "max" or int(limit) >= 2**60:  # version 1 writes a huge number for no limit
            return None
        reclaimable = next((int(v) for k, v in map(str.split, statistics.splitlines()) if k == key), 0)
        return max(0.0, float(int(limit) - used + reclaimable))
    return None


def check_memory(config: RunConfig, world_size: int, machine: Machine | None = None) -> list[str]:
    """Write the line on memory of the start-up report; allocates nothing. Raises PreflightError where it does not fit.

    `config.model.vocab_size` must be known. Without `machine` this one is looked up, and all ranks go by the tightest
    (collective): they pass or fail together.
    """
    if machine is None:
        machine = look_up_machine()
        if dist.is_initialized():
            found_everywhere = [machine.bytes_found] * dist.get_world_size()
            dist.all_gather_object(found_everywhere, machine.bytes_found)
            machine = replace(machine, bytes_found=min(found_everywhere))
    layout = parallel_layout(config, world_size)
    need = estimate(config, layout, device=machine.device)
    found = machine.per_rank()
    by = f" by {need.stage}" if need.stage else ""
    summary = (
        f"memory per rank: {need.total / GIB:.2f} GiB needed{by}, {found / GIB:.2f} GiB found "
        f"({machine.source}, {machine.local_ranks} rank{'s' if machine.local_ranks > 1 else ''} on this machine)"
    )
    if need.total <= found:
        return [summary]
    raise PreflightError(
        "\n".join(
            [
                f"the recipe does not fit this machine; {layout}",
                summary,
                *need.lines(),
                *_advice(config, machine, layout),
            ]
        )
    )


def stage_lines(config: RunConfig, world_size: int, device: str) -> list[str]:
    """Write what each pipeline stage needs and computes, and how long it waits; nothing where there is one stage.

    The model's vocabulary must be known.
    """
    layout, t = parallel_layout(config, world_size), config.training
    if layout.pp == 1:
        return []
    stages = stage_estimates(config, layout, device=device)
    lines = [
        f"  {x.stage}: {x.total / GIB:.2f} GiB, {share:.1%} of the update's FLOPs"
        for x, share in zip(stages, stage_shares(config, layout), strict=True)
    ]
    waits = idle(layout, t.global_batch_size // (t.micro_batch_size * layout.dp))
    return [*lines, f"  a stage waits {waits:.0%} of an update for others (stages taken as equally fast)"]


def start_up_report(config: RunConfig, world_size: int, machine: Machine | None = None) -> list[str]:
    """Write the lines on memory (`check_memory`, which raises), on stages, and on what a scoring pass sends."""
    lines = check_memory(config, world_size, machine)
    device = machine.device if machine is not None else look_up_machine().device
    lines += stage_lines(config, world_size, device)
    sent = scoring_traffic(config, parallel_layout(config, world_size))
    total = sum(sent.values())
    if config.selection.scores_gradients and total:
        most = max(sent, key=lambda part: sent[part])
        lines.append(
            f"traffic per rank: {total / 1e6:.2f} MB sent by one scoring pass, {sent[most] / 1e6:.2f} MB of it {most}"
        )
    return lines


def fitting_layouts(config: RunConfig, machine: Machine) -> Iterator[tuple[ParallelLayout, MemoryEstimate]]:
    """List layouts of the recipe's engine that fit machines like this one.

    Fewest ranks first, then the lowest tensor-parallel degree, the fewest stages, the lowest ZeRO stage.
    """
    found = [layout for layout in dict.fromkeys(_candidates(config)) if _possible(config, layout)]
    # of two micro-batch sizes that fit, the larger one is the faster
    found.sort(key=lambda x: (x.ranks, x.tp, x.pp, x.zero_stage, -x.micro_batch_size))
    for layout in found:
        need = estimate(config, layout, device=machine.device)
        # more ranks than are here now need more machines like this one, each with as many ranks
        if need.total <= machine.per_rank(min(layout.ranks, machine.local_ranks)):
            yield layout, need


def _candidates(config: RunConfig) -> Iterator[ParallelLayout]:
    """Vary what one engine can: tensor and data parallelism, and ZeRO stages or pipeline stages."""
    own, size = parallel_layout(config, MAX_RANKS), config.training.micro_batch_size
    megatron = own.engine == "megatron"
    pipelines = _divisors(config.model.num_layers) if megatron else [1]
    splits = [own.zero_stage] if megatron else STAGES
    for tp, pp, stage, micro in itertools.product(
        tensor_parallel_degrees(config.model), pipelines, splits, _divisors(size)
    ):
        pieces = own.pieces if pp > 2 else 1  # two interleaved stages are refused by Megatron
        dp = 1
        while tp * pp * dp <= MAX_RANKS:
            yield replace(own, tp=tp, pp=pp, pieces=pieces, dp=dp, zero_stage=stage, micro_batch_size=micro)
            dp *= 2


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _possible(config: RunConfig, layout: ParallelLayout) -> bool:
    asked = replace(
        config,
        parallel=replace(
            config.parallel,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.pieces if layout.pieces > 1 else None,
            zero_stage=layout.zero_stage,
        ),
        training=replace(config.training, micro_batch_size=layout.micro_batch_size),
    )
    try:
        validate(asked)
        validate_world(asked, layout.ranks)
    except ConfigError:
        return False
    return True


def _advice(config: RunConfig, machine: Machine, layout: ParallelLayout) -> list[str]:
    lines = _gentler_scoring(config, machine, layout)
    layouts: list[str] = []
    shown: set[tuple[int, int, int]] = set()
    for other, need in fitting_layouts(config, machine):
        if (other.ranks, other.tp, other.pp) in shown:
            continue  # a higher ZeRO stage or a smaller microbatch of a layout that is listed
        shown.add((other.ranks, other.tp, other.pp))
        layouts.append(f"  {other}  ({need.total / GIB:.2f} GiB per rank)")
        if len(layouts) == SUGGESTIONS:
            break
    if layouts:
        plural = "s" if machine.local_ranks > 1 else ""
        where = f"machines like this one, {machine.local_ranks} rank{plural} each"
        if machine.device == "cuda":
            where = "GPUs like this one"
        lines += [f"layouts that would fit on {where}:", *layouts]
    else:
        lines.append(f"no layout of up to {MAX_RANKS} ranks like this one fits the recipe as it is")
    return [*lines, *_smaller(config, machine, layout)]


def _with_scoring(config: RunConfig, sequences: int) -> RunConfig:
    return replace(config, selection=replace(config.selection, score_micro_batch_size=sequences))


def _gentler_scoring(config: RunConfig, machine: Machine, layout: ParallelLayout) -> list[str]:
    """Find the largest scoring micro-batch with which the recipe fits here, when that is all it takes."""
    size = config.selection.score_micro_batch_size or config.buffer_size + config.selection.proxy_batch_size
    while size > 1:
        size //= 2
        need = estimate(_with_scoring(config, size), layout, device=machine.device).total
        if need <= machine.per_rank():
            return [f"it fits with selection.score_micro_batch_size={size}  ({need / GIB:.2f} GiB per rank)"]
    return []


def _smaller(config: RunConfig, machine: Machine, layout: ParallelLayout) -> list[str]:
    """Find the largest recipe of the same width that fits these ranks, shortening sequences before dropping layers."""
    layers, together = config.model.num_layers, layout.pp * layout.pieces
    while layers >= together:
        length = config.data.seq_length
        while length >= 128:
            # as many tokens in a scoring forward as in a training microbatch
            score_length = min(config.selection.score_length, length)
            size = max(1, length * layout.micro_batch_size // score_length)
            asked = replace(
                _with_scoring(config, size),
                model=replace(config.model, num_layers=layers),
                data=replace(config.data, seq_length=length),
            )
            need = estimate(asked, layout, device=machine.device).total
            if need <= machine.per_rank():
                return [
                    f"a smaller recipe that fits here: model.num_layers={layers} data.seq_length={length} "
                    f"selection.score_micro_batch_size={size}  ({need / GIB:.2f} GiB per rank)"
                ]
            length //= 2
        layers = layers // 2 // together * together  # stages and pieces hold equally many
    return []
