"""The optimizer of a recipe: which parameters form which group, and the implementation that this machine has.

name    groups (weight decay)                                                            implementation
adamw   matrices (weight_decay), vectors (0)                                             extras.adamw
sgd     matrices (weight_decay), vectors (0)                                             torch SGD
muon    other matrices (weight_decay), vectors (0), block matrices (muon_weight_decay)   DeepSpeed's MuonWithAuxAdam

The first group always has the rate `lr`. Rates are 0 until the scheduler sets that of step 0: DeepSpeed's bf16
optimizer of stage 0 takes a step on zero gradients when it starts, which would decay the initial weights.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from megatron_opus.backends.engines.deepspeed import muon
from megatron_opus.backends.model import extras, releases
from megatron_opus.config import OptimizerConfig


def parameter_groups(
    model: nn.Module, optimizer: OptimizerConfig, by_muon: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Group the trainable parameters as in the table above, without empty groups; a tied weight stands once.

    by_muon: names of the block matrices (`ModelLayout.by_muon`).
    """
    hybrid = optimizer.name == "muon"
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    blocks: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (blocks if hybrid and name in by_muon else matrices if p.ndim >= 2 else vectors).append(p)
    groups: list[dict[str, Any]] = []
    for members, decay in ((matrices, optimizer.weight_decay), (vectors, 0.0)):
        group = {"params": members, "weight_decay": decay, "lr": 0.0, "initial_lr": optimizer.lr}
        groups.append({**group, "use_muon": False} if hybrid else group)
    if hybrid:
        groups.append(
            {
                "params": blocks,
                "use_muon": True,
                "momentum": optimizer.muon_momentum,
                "weight_decay": optimizer.muon_weight_decay,
                "lr": 0.0,
                "initial_lr": optimizer.muon_lr,
            }
        )
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, by_muon: Collection[str], *, offload: bool
) -> tuple[torch.optim.Optimizer, str]:
    """Make the optimizer around `model`'s trainable parameters, and say what it is.

    by_muon: names of the block matrices (`ModelLayout.by_muon`). offload: the optimizer's tensors will lie in host
    memory, where fused CUDA kernels cannot work.
    """
    groups = parameter_groups(model, config, by_muon)
    hyper = {"lr": 0.0, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum), "PyTorch SGD"
    if config.name == "adamw":
        return extras.host_adamw(groups, **hyper) if offload else extras.adamw(groups, extras.detect_apex(), **hyper)
    muon.tag(model, by_muon)
    muon.kernels()  # eager before the optimizer is built
    optimizers = releases.deepspeed_muon()[1]
    for group in groups:
        if not group["use_muon"]:
            group |= {"betas": hyper["betas"], "eps": hyper["eps"]}
    fused = torch.cuda.is_available() and not offload
    optimizer = optimizers.MuonWithAuxAdam(
        groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": fused}
    )
    return optimizer, f"DeepSpeed Muon with PyTorch AdamW{' (fused)' if fused else ''}"
