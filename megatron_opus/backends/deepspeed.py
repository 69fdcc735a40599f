"""DeepSpeed: process start-up, the engine, and the few places where its ZeRO stages differ from each other."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_opus.backends import cpu_shims, extras
from megatron_opus.config import ConfigError, OptimizerConfig, ParallelConfig, RunConfig
from megatron_opus.types import Groups

__all__ = ["ModelParallelUnit", "global_gradient_norm", "init_distributed", "initialize", "take_step"]


def init_distributed(parallel: ParallelConfig) -> torch.device:
    """Join the processes that the launcher started (or stand alone without one); the device of this process.

    NCCL with a GPU per process, gloo without any. A process group that exists already is kept. Collectives that wait
    longer than `distributed_timeout_minutes` raise instead of hanging. Raises ConfigError when processes outnumber the
    GPUs of this machine.
    """
    cpu_shims.install()
    import deepspeed

    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it, even without a launcher
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
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    # One line per rank and internal decision otherwise; warnings stay.
    deepspeed.utils.logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    return device


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step needs beside the engine; kept on it as `engine.step_settings`."""

    groups: Groups
    gradient_clipping: float


class ModelParallelUnit:
    """megatron-core's parallel state under the names that DeepSpeed asks for."""

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    def get_data_parallel_group(self) -> Any:
        return parallel_state.get_data_parallel_group()


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay, norms and biases without; a tied weight once."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    # The rate is 0 until the scheduler sets that of step 0: DeepSpeed's bf16 optimizer of stage 0 takes a step on zero
    # gradients when it starts, which would decay the initial weights.
    common = {"lr": 0.0, "initial_lr": optimizer.lr}
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optimizer.weight_decay, **common},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0, **common},
    ]


def gradient_bucket(parameters: int) -> int:
    """Elements that ZeRO reduces at a time: DeepSpeed's default buffer of 500 million is larger than a small model."""
    return min(200_000_000, max(1, parameters))


def deepspeed_config(config: RunConfig, dp_size: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a rank with so many parameters.

    Raises ConfigError unless K = micro_batch_size x accumulation steps x data-parallel size.
    """
    t, stage = config.training, config.parallel.zero_stage
    steps, rest = divmod(t.global_batch_size, t.micro_batch_size * dp_size)
    if rest or not steps:
        raise ConfigError(
            f"training.global_batch_size: expected a multiple of micro_batch_size x data-parallel size "
            f"({t.micro_batch_size} x {dp_size}), got {t.global_batch_size}"
        )
    bf16 = t.precision == "bf16"
    values: dict[str, Any] = {
        "train_batch_size": t.global_batch_size,
        "train_micro_batch_size_per_gpu": t.micro_batch_size,
        "gradient_accumulation_steps": steps,
        # Stage 0 is clipped in take_step: its fp32 path keeps no norm, and its bf16 path leaves the shards of every
        # tensor-parallel rank but the first out of it.
        "gradient_clipping": 0.0 if stage == 0 else t.gradient_clipping,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": gradient_bucket(parameters),
            "allgather_bucket_size": gradient_bucket(parameters),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if bf16 and stage > 0 and steps > 1:
        # Eight bits of mantissa lose small microbatch gradients in a running sum.
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    return values


def initialize(
    model: nn.Module, config: RunConfig, groups: Groups, lr_of_step: Callable[[int], float]
) -> tuple[Any, str]:
    """DeepSpeed engine around `model` with AdamW, and which AdamW it is. Collective.

    `lr_of_step(s)` is the learning rate of optimizer step s, from 0. The engine's scheduler is a torch LambdaLR.
    """
    import deepspeed

    o = config.optimizer
    optimizer, taken = extras.adamw(
        parameter_groups(model, o), extras.detect_apex(), lr=0.0, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the bf16 optimizer prints memory tables; warnings are logged
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda basic: torch.optim.lr_scheduler.LambdaLR(basic, lambda step: lr_of_step(step) / o.lr),
            mpu=ModelParallelUnit(),
            config=deepspeed_config(config, groups.dp_size, sum(p.numel() for p in model.parameters())),
            dist_init_required=False,
        )
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True  # in fp32 too, which not every version checks by itself
    if hasattr(engine.optimizer, "fp32_groups") or hasattr(engine.optimizer, "fp32_groups_flat"):
        # Forget that step on zero gradients: Adam's bias correction would be one step ahead for the whole run.
        engine.optimizer.optimizer.state.clear()
        for group in engine.optimizer.optimizer.param_groups:
            group.pop("step", None)  # where Apex counts
    engine.step_settings = StepSettings(groups=groups, gradient_clipping=config.training.gradient_clipping)
    return engine, taken


def global_gradient_norm(model: nn.Module, groups: Groups) -> torch.Tensor:
    """2-norm of the whole gradient, float32 scalar: shards of all tensor-parallel ranks, replicated parameters once.

    p.grad must already be averaged over data-parallel ranks.
    """
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    device = with_gradient[0].device
    squares = torch.zeros(2, dtype=torch.float32, device=device)  # sharded, replicated
    for kind, sharded in enumerate((True, False)):
        norms = [
            torch.linalg.vector_norm(p.grad, dtype=torch.float32)
            for p in with_gradient
            if bool(getattr(p, "model_parallel", False)) == sharded
        ]
        if norms:
            squares[kind] = torch.stack(norms).square().sum()
    if groups.tp is not None:
        dist.all_reduce(squares[0], group=groups.tp)
    return squares.sum().sqrt()


def take_step(engine: Any) -> tuple[float, bool]:
    """The last microbatch's `engine.step()`: gradient norm before clipping, and whether weights were updated.

    A NaN or Inf anywhere in the gradient leaves weights, optimizer state and learning rate as they are, at every stage.
    """
    groups, clipping = engine.step_settings.groups, engine.step_settings.gradient_clipping
    if engine.zero_optimization_stage() == 0:
        norm = global_gradient_norm(engine.module, groups)
        finite = bool(torch.isfinite(norm))
        for parameter in engine.module.parameters():
            if parameter.grad is None:
                continue
            if not finite:
                parameter.grad = None
            elif clipping > 0 and norm + 1e-6 > clipping:
                parameter.grad.mul_(clipping / (norm + 1e-6))
        if not finite:
            return _skip_stage_0(engine), False
        engine.step()
        return norm.item(), True
    engine.step()
    norm = engine.get_global_grad_norm()
    value = float(norm) if norm is not None else math.nan
    applied = bool(engine.was_step_applied())
    return (value if applied else math.inf), applied


def _skip_stage_0(engine: Any) -> float:
    """Count a step without taking it, as the ZeRO stages do: no scheduler step, no optimizer step."""
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()
    engine.skipped_steps += 1
    return math.inf
