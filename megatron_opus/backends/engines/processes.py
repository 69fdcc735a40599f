"""Start of the processes of a run, whichever engine it uses."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_opus.backends.model import cpu_shims
from megatron_opus.config import ConfigError, ParallelConfig


class CannotMeet(ConfigError):
    """The processes of a run cannot reach each other where the launcher told them to meet."""

    of_one_rank = True


def init_distributed(parallel: ParallelConfig) -> torch.device:
    """Join the processes that the launcher started (or stand alone without one); return the device of this process.

    NCCL with a GPU per process, gloo without any. A process group that exists already is kept. Collectives that wait
    longer than `distributed_timeout_minutes` raise instead of hanging. Raises ConfigError when processes outnumber the
    GPUs of this machine.
    """
    cpu_shims.install()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # hosts insist on it, even without a launcher
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank}: expected fewer processes than GPUs ({torch.cuda.device_count()}); start "
                f"deepspeed --num_gpus {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
        if "RANK" in os.environ:
            _join(backend, timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    return device


def _join(backend: str, timeout: timedelta) -> None:
    """Meet the other processes. Raises CannotMeet where they cannot, with the place and the remedy."""
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise CannotMeet(
                f"the processes are to meet at {place}, but that port is in use by another program or run; choose "
                "another one: --master_port <number> (deepspeed), --master-port <number> (torchrun)"
            ) from error
        reason = str(error).splitlines()[0]
        raise CannotMeet(
            f"the processes are to meet at {place} (MASTER_ADDR, MASTER_PORT), and could not: {reason}; start all of "
            "them with the same address of the first machine, and with a port that is open between them"
        ) from error
