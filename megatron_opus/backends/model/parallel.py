"""Parallel groups and random states of megatron-core."""

from __future__ import annotations

import hashlib
import os
import random
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_opus.backends.model import cpu_shims, releases
from megatron_opus.config import ConfigError, ParallelConfig
from megatron_opus.types import Groups


def init_parallel(parallel: ParallelConfig, *, seed: int = 0) -> Groups:
    """Make the parallel groups over the processes that torch.distributed already knows, and seed all generators.

    May be called again with other degrees. Raises RuntimeError when torch.distributed has not been initialised and
    ConfigError when the degrees do not divide the number of processes.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            "init_parallel: expected an initialised torch.distributed, got none; call init_distributed first"
        )
    world, tp = torch.distributed.get_world_size(), parallel.tensor_model_parallel_size
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    ep = parallel.expert_model_parallel_size
    if world % (tp * pp):
        wanted = f"tensor_model_parallel_size: {tp}" if pp == 1 else f"tensor x pipeline parallel: {tp} x {pp}"
        raise ConfigError(f"parallel.{wanted} does not divide the {world} processes started")
    cpu_shims.install()
    if tp > 1:
        # Overlapping tensor-parallel communication with matmuls relies on kernels starting in issue order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if (stage := world // pp) % ep:
        raise ConfigError(
            f"parallel.expert_model_parallel_size: {ep} does not divide the {stage} processes of a pipeline stage"
        )
    if parallel_state.model_parallel_is_initialized() and (tp, pp, vpp, ep) != (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    ):
        _leave_groups()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
            create_gloo_process_groups=False,
        )
    groups = megatron_groups()
    seed_all(seed, groups)
    return groups


def _leave_groups() -> None:
    """Forget the groups of other degrees and end their threads, which Megatron alone would leave."""
    values = [x for value in vars(parallel_state).values() for x in (value if isinstance(value, list) else [value])]
    groups = {id(x): x for x in values if isinstance(x, torch.distributed.ProcessGroup)}
    parallel_state.destroy_model_parallel()
    for group in groups.values():
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


def seed_all(seed: int, groups: Groups) -> None:
    """Seed Python, numpy, torch and Megatron's tracker.

    Default states differ between data-parallel ranks only: dropout outside tensor-parallel regions must be the same on
    all ranks that share a sequence. The tracked states differ between tensor-parallel ranks as well.
    """
    base = derived_seed(seed, "data-parallel", groups.dp_rank)
    stage = (groups.pp_rank,) if groups.pp_rank else ()  # other layers lie there, with dropout of their own
    inner = derived_seed(seed, "model-parallel", groups.dp_rank, groups.tp_rank, *stage)
    random.seed(base)
    np.random.seed(base % 2**32)
    torch.manual_seed(base)
    if cpu_shims.active():
        names: Any = releases.megatron_random()
        cpu_shims.install_rng_tracker(
            {
                names._DATA_PARALLEL_RNG_TRACKER_NAME: base,
                names._MODEL_PARALLEL_RNG_TRACKER_NAME: inner,
                names._EXPERT_PARALLEL_RNG_TRACKER_NAME: inner + 1,
            }
        )
    else:
        model_parallel_cuda_manual_seed(base, tp_rank=groups.tp_rank, force_reset_rng=True)


def rng_tracker() -> Any:
    """Megatron's tracker of named random states: `get_states()` and `set_states(states)`."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def derived_seed(seed: int, *path: object) -> int:
    """A 31-bit seed for one purpose: independent streams from one number."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def megatron_groups() -> Groups:
    """Read this process's place in megatron-core's parallel state, which must be initialised.

    Raises ConfigError where Megatron was started with generalised tensor parallelism.
    """
    if (size := releases.generalized_tensor_parallel_size()) > 1:
        raise ConfigError(
            f"generalised tensor parallelism: expected gtp_remat_size 1, got {size}; the scores of weights that are "
            "cut that way are not known: use tensor_model_parallel_size"
        )
    kinds = {"tp": "tensor_model", "dp": "data", "pp": "pipeline_model", "cp": "context", "ep": "expert_model"}
    found: dict[str, Any] = {}
    for short, kind in kinds.items():
        group, rank, size = (
            getattr(parallel_state, f"get_{kind}_parallel_{x}") for x in ("group", "rank", "world_size")
        )
        found |= {short: group() if size() > 1 else None, f"{short}_rank": rank(), f"{short}_size": size()}
    inner = found["tp_size"] * found["cp_size"]
    if found["cp_size"] > 1:  # ZeRO cuts the state over both
        found["state"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        found["state_rank"] = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        found["state_size"] = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        found |= {"tokens": parallel_state.get_tensor_and_context_parallel_group(), "shares": 1}
    if found["ep_size"] > 1:
        found["expert_state_rank"] = parallel_state.get_expert_data_parallel_rank()
        if parallel_state.get_expert_data_parallel_world_size() > 1:
            found["expert_state"] = parallel_state.get_expert_data_parallel_group()
        sent = parallel_state.get_expert_tensor_and_model_parallel_group()
        if (size := torch.distributed.get_world_size(sent)) > inner:  # both are blocks of neighbouring ranks
            shares = size // inner
            found |= {"tokens": sent, "shares": shares, "share": found["dp_rank"] % shares}
    return Groups(**found)
