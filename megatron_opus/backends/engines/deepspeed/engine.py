"""Build a DeepSpeed engine: its configuration, and the few places where its ZeRO stages differ from each other."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_opus.backends.engines.base import accumulation_steps
from megatron_opus.backends.engines.deepspeed.gradients import gradients_of
from megatron_opus.backends.engines.deepspeed.memory import gradient_bucket
from megatron_opus.backends.engines.deepspeed.optimizers import build_optimizer
from megatron_opus.backends.engines.deepspeed.partition import Partition
from megatron_opus.backends.engines.deepspeed.second_moment import SecondMoment
from megatron_opus.backends.engines.deepspeed.stepping import StepSettings
from megatron_opus.config import RunConfig, keeps_second_moment
from megatron_opus.config.checks import accumulates_in_fp32
from megatron_opus.layout.model_layout import recipe_layout
from megatron_opus.types import Groups


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


def deepspeed_config(config: RunConfig, dp_size: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a rank with so many parameters.

    Raises ConfigError unless K = micro_batch_size x accumulation steps x data-parallel size.
    """
    t, steps = config.training, accumulation_steps(config, dp_size)
    bf16 = t.precision == "bf16"
    values: dict[str, Any] = {
        "train_batch_size": t.global_batch_size,
        "train_micro_batch_size_per_gpu": t.micro_batch_size,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": 0.0 if clips_by_itself(config) else t.gradient_clipping,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero_settings(config, parameters),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # which one fits the machine is decided in extras.py
        "steps_per_print": 10**9,
    }
    if accumulates_in_fp32(config, dp_size):
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    return values


def clips_by_itself(config: RunConfig) -> bool:
    """Norm and clipping are done in `take_step` rather than by DeepSpeed.

    DeepSpeed's stage 0 keeps no norm in fp32 and leaves the shards of every tensor-parallel rank but the first out of
    it in bf16; with Muon, the other stages would clip the orthogonalised update instead of the gradient.
    """
    return config.parallel.zero_stage == 0 or config.optimizer.name == "muon"


def zero_settings(config: RunConfig, parameters: int) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` section for a rank with so many parameters."""
    stage, bucket = config.parallel.zero_stage, gradient_bucket(parameters)
    values: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if config.parallel.offload_optimizer == "cpu":
        values["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        values |= {
            # vectors stay whole; a matrix is gathered for the module that uses it and given back after it
            "stage3_param_persistence_threshold": 8 * config.model.hidden_size,
            "stage3_prefetch_bucket_size": min(50_000_000, bucket),
            "stage3_max_live_parameters": bucket,
            "stage3_max_reuse_distance": 0,
        }
    if config.optimizer.name == "muon" and (stage == 3 or config.training.precision == "bf16"):
        # Stage 3 insists on it. At stage 2 in bf16 DeepSpeed 0.19 merges the range of a Muon gradient with the one
        # before it in the bucket and loses that one, an AdamW gradient that was to be summed in float32.
        values["reduce_scatter"] = False
    return values


def initialize(
    model: nn.Module, config: RunConfig, groups: Groups, lr_of_step: Callable[[int], float]
) -> tuple[Any, str]:
    """DeepSpeed engine around `model` with the recipe's optimizer, and which one it is. Collective.

    `lr_of_step(s)` is the learning rate of optimizer step s, from 0; groups with another rate follow in proportion.
    The engine's scheduler is a torch LambdaLR.
    """
    import deepspeed

    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    # One line per rank and internal decision otherwise; warnings stay.
    deepspeed.utils.logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    o = config.optimizer
    by_muon = recipe_layout(config, groups.tp_size).by_muon if o.name == "muon" else frozenset()
    names = {name: p for name, p in model.named_parameters() if name in by_muon}
    optimizer, taken = build_optimizer(model, o, by_muon, offload=config.parallel.offload_optimizer == "cpu")
    # BF16_Optimizer refuses Muon beside any mpu; without tensor parallelism there is nothing for an mpu to say
    alone = o.name == "muon" and groups.tp_size == 1
    with contextlib.redirect_stdout(io.StringIO()):  # the bf16 optimizer prints memory tables; warnings are logged
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda basic: torch.optim.lr_scheduler.LambdaLR(basic, lambda step: lr_of_step(step) / o.lr),
            mpu=None if alone else ModelParallelUnit(),
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
    partition = Partition(engine)
    if partition.kind == "zero3" and partition.offloaded and o.name == "muon":
        # DeepSpeed would make it in bf16, but restore it from a checkpoint in float32: another run after a resume
        for flat, uses_muon in zip(partition.flat, engine.optimizer.sub_groups_using_muon, strict=True):
            if uses_muon:
                partition.optimizer.state[flat]["momentum_buffer"] = torch.zeros_like(flat, requires_grad=False)
    engine.step_settings = StepSettings(
        groups=groups,
        gradient_clipping=config.training.gradient_clipping,
        gradients=gradients_of(partition, engine.module) if clips_by_itself(config) else None,
        second_moment=SecondMoment(partition, names, beta1=o.adam_beta1, beta2=o.adam_beta2, eps=o.adam_eps)
        if keeps_second_moment(config)
        else None,
    )
    return engine, taken
