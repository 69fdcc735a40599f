"""Checkpoints of Megatron's engine, in the format of `megatron.core.dist_checkpointing`.

Weights and optimizer state lie in one directory as tensors of the whole model: every parameter with its moments, under
its name in the whole model. Ranks write the parts that they hold, and read the parts that they need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_opus.backends.engines.megatron.muon import leaves
from megatron_opus.backends.model import releases
from megatron_opus.errors import CheckpointError

DistributedOptimizer = releases.distributed_optimizer()
_strategies: Any = releases.torch_dist_strategies()

STEPS, MOMENTS = "completed_steps", "moments"
KINDS = ("param", "exp_avg", "exp_avg_sq")


class _InThisProcess(_strategies.TorchDistSaveShardedStrategy):
    """Writes Megatron's `torch_dist` format with PyTorch's own writer.

    Megatron's starts a process to collect results, which would outlive a rank that is killed.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        by_key, *_ = _strategies._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        dcp.save(
            _strategies.mcore_to_pyt_state_dict(by_key, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir),
            planner=_strategies.MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


def save(directory: Path, pieces: Sequence[Any], optimizer: Any, steps: int) -> None:
    """Write this rank's part of weights and optimizer state below `directory`. Collective."""
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    fresh = _allocate(optimizer)
    state = _sharded(pieces, optimizer, loading=False)
    dist_checkpointing.save({**state, STEPS: steps}, str(directory), sharded_strategy=_InThisProcess("torch_dist", 1))
    dist.barrier()  # rank 0 writes last what holds it all together
    for part in fresh:
        part.optimizer.state.clear()


@torch.no_grad()
def load(directory: Path, pieces: Sequence[Any], optimizer: Any) -> int:
    """Restore what `save` wrote, and return the steps that had been completed. Collective.

    The data-parallel size may be another one. Raises CheckpointError when there is nothing to load.
    """
    if not (directory / "metadata.json").is_file():
        raise CheckpointError(f"checkpoint {directory}: expected Megatron's metadata.json, found none")
    fresh = _allocate(optimizer)
    found = dist_checkpointing.load({**_sharded(pieces, optimizer, loading=True), STEPS: 0}, str(directory))
    for number, piece in enumerate(pieces):
        piece.load_state_dict(found[f"model{number}"])
    steps = int(found[STEPS])
    for number, part in enumerate(optimizer.chained_optimizers):
        _load_part(part, found[f"optimizer{number}"], steps)
    if not steps:
        for part in fresh:
            part.optimizer.state.clear()
    return steps


def _sharded(pieces: Sequence[Any], optimizer: Any, *, loading: bool) -> dict[str, Any]:
    """Describe this rank's weights and optimizer state as parts of the whole model's tensors. Collective."""
    state: dict[str, Any] = {f"model{i}": piece.sharded_state_dict() for i, piece in enumerate(pieces)}
    for number, part in enumerate(optimizer.chained_optimizers):
        if isinstance(part, DistributedOptimizer):
            found = {**part.state_dict(), MOMENTS: _moments(part, state, loading=loading)}
        else:
            found = part.sharded_state_dict(state, is_loading=loading)
        state[f"optimizer{number}"] = found
    return state


def _moments(part: Any, model: dict[str, Any], *, loading: bool) -> dict[int, dict[str, Any]]:
    """Give master weight and moments of every parameter the parameter's own shape and place in the whole model.

    Megatron's own `fully_reshardable` shifts them where a buffer has several buckets with padding between them.
    """
    described, _ = extract_sharded_tensors_and_factories(model)
    place = {id(x.data): x for x in nested_values(described)}
    found: dict[int, dict[str, Any]] = {}
    for p in (p for buffer in part.buffers for p in buffer.params):
        owned = {}
        if p in part.model_param_group_index_map and not loading:
            owned = part._get_main_param_and_optimizer_states(p)
        found[len(found)] = tensors = {}
        for kind in KINDS:
            value = torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
            if owned:
                lies = part._get_model_param_range_map(p)["param"]
                value[lies.start : lies.end] = owned[kind].detach()
            if not loading:
                dist.all_reduce(value, group=part.data_parallel_group)
            changed: dict[str, Any] = {
                "key": f"optimizer.state.{kind}.{place[id(p)].key}",
                "data": value.view(p.shape).cpu(),
            }
            if isinstance(place[id(p)], ShardedTensor):  # a factory makes its tensors of what it is given
                changed["dtype"] = torch.float32
            tensors[kind] = dataclasses.replace(place[id(p)], **changed)
    return found


def _load_part(part: Any, state: dict[str, Any], steps: int) -> None:
    if not isinstance(part, DistributedOptimizer):
        part.load_state_dict(state)
    else:
        moments = state.pop(MOMENTS)
        part.load_state_dict(state)
        # PyTorch's own AdamW counts steps beside the moments, where Megatron then looks for a saved tensor
        for kept in part.optimizer.state.values():
            kept.pop("step", None)
        for number, p in enumerate(p for buffer in part.buffers for p in buffer.params):
            if p in part.model_param_group_index_map:
                lies = part._get_model_param_range_map(p)["param"]
                own = {kind: moments[number][kind].flatten()[lies.start : lies.end] for kind in KINDS}
                part._set_main_param_and_optimizer_states(p, own)
    if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
        for kept in part.optimizer.state.values():
            # one tensor for each: Megatron gives all of them the same one, which every parameter would increase
            kept["step"] = torch.tensor(float(steps))


def _allocate(optimizer: Any) -> list[Any]:
    """Give every optimizer the state tensors by which Megatron describes a checkpoint; return those that had none.

    A step on zero gradients at rate 0 moves no weight.
    """
    fresh = []
    for part, _ in leaves(optimizer):
        inner = part.optimizer
        if inner is None or inner.state:
            continue
        fresh.append(part)
        part.init_state_fn = part.init_state_fn or (lambda *args: None)  # SGD has none, and Megatron calls it
        rates = [(group["lr"], group["weight_decay"]) for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        for group, (lr, decay) in zip(inner.param_groups, rates, strict=True):
            group["lr"], group["weight_decay"] = lr, decay
            for parameter in group["params"]:
                parameter.grad = None
    return fresh
