"""Megatron's Muon in tests: is it installed, a recipe, its older layout, and the same run written out by hand."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from gpt_runs import batch_of_step, recipe

from megatron_opus.backends.model import releases
from megatron_opus.config import RunConfig


def installed() -> bool:
    try:
        releases.megatron_muon()
    except releases.UnsupportedRelease:
        return False
    return True


needs_muon = pytest.mark.skipif(not installed(), reason="this megatron-core has no Muon, or lacks emerging-optimizers")

# plain: momentum whole on every data-parallel rank; layer-wise: on exactly one, in the two layouts that Megatron makes
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"parallel": {"engine": "megatron", "use_distributed_optimizer": False}},
    "plain, bf16": {"parallel": {"engine": "megatron", "use_distributed_optimizer": False}, "precision": "bf16"},
    "layer-wise": {"parallel": {"engine": "megatron"}, "precision": "bf16"},
    "layer-wise, overlaps": {
        "parallel": {"engine": "megatron", "overlap_grad_reduce": True, "overlap_param_gather": True},
        "precision": "bf16",
    },
    "layer-wise, by size": {"parallel": {"engine": "megatron"}, "precision": "bf16"},
}


def muon_recipe(kind: str, muon: dict[str, Any] | None = None, **arguments: Any) -> RunConfig:
    """`muon`: keys of the optimizer section. Newton-Schulz in float32: bf16's rounding would hide what is compared."""
    config = recipe(optimizer="muon", **{**KINDS[kind], **arguments})
    keys = {"muon_lr": 2e-3, "muon_weight_decay": 0.05, "muon_fp32_matmul_prec": "highest", **(muon or {})}
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **keys))


@contextlib.contextmanager
def layout_of(kind: str) -> Iterator[None]:
    """Make Megatron deal parameters out by size inside the block, where `kind` says so: its layout before 0.18."""
    from megatron_opus.backends.engines.megatron import ddp

    if not kind.endswith("by size"):
        yield
        return
    wrap = ddp._wrap

    def plainly(pieces: list[Any], config: RunConfig) -> list[Any]:
        parallel = dataclasses.replace(config.parallel, use_distributed_optimizer=False)
        return wrap(pieces, dataclasses.replace(config, parallel=parallel))

    with mock.patch.object(ddp, "_wrap", plainly), mock.patch("torch.distributed.all_gather", _unequal_all_gather):
        yield


def _unequal_all_gather(tensors: list[torch.Tensor], own: torch.Tensor, group: Any = None) -> None:
    """In place of NCCL's, which takes parts of different sizes; gloo's does not."""
    import torch.distributed as dist

    tensors[dist.get_rank(group)].copy_(own)
    for rank, tensor in enumerate(tensors):
        dist.broadcast(tensor, dist.get_global_rank(group, rank) if group is not None else rank, group=group)


QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalised(q: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz with the quintic coefficients, in float64, on the matrix itself."""
    x = q.double() / q.double().norm()
    for a, b, c in QUINTIC:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def by_hand(config: RunConfig, steps: int) -> dict[str, Any]:
    """Train in one process with Muon and AdamW written out; Muon takes matrices but the (tied) token embedding."""
    from megatron_opus.backends.engines.schedule import learning_rate
    from megatron_opus.backends.model.build import build_model
    from megatron_opus.backends.model.gpt import forward_loss
    from megatron_opus.backends.model.parallel import init_parallel

    o, rate = config.optimizer, learning_rate(config.optimizer, config.training.train_steps)
    init_parallel(config.parallel, seed=config.seed)
    model = build_model(config)
    names = dict(model.named_parameters())
    by_muon = [n for n, p in names.items() if p.ndim == 2 and not n.startswith(("embedding.word", "output_layer"))]
    rest = {n: p for n, p in names.items() if n not in by_muon}
    groups = [
        {"params": [p for p in rest.values() if (p.ndim >= 2) is matrices], "weight_decay": decay}
        for matrices, decay in ((True, o.weight_decay), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps)
    momenta = {n: torch.zeros_like(names[n]) for n in by_muon}
    head = config.model.hidden_size // config.model.num_attention_heads
    results = []
    for step in range(steps):
        batch = batch_of_step(step)
        losses = forward_loss(model, batch)
        model.zero_grad()
        loss = ((losses * batch.loss_mask).sum(1) / batch.loss_mask.sum(1)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        results.append((loss.item(), norm.item()))
        for group in adamw.param_groups:
            group["lr"] = rate(step)
        adamw.step()
        lr = rate(step) * o.muon_lr / o.lr
        with torch.no_grad():
            for n in by_muon:
                w, m = names[n], momenta[n]
                m.mul_(o.muon_momentum).add_(w.grad, alpha=1 - o.muon_momentum)
                q = (1 - o.muon_momentum) * w.grad + o.muon_momentum * m if o.muon_nesterov else m
                parts = [torch.arange(len(w))]
                if n.endswith("linear_qkv.weight") and o.muon_split_qkv:
                    kind = torch.arange(len(w)) // head % 3  # as many keys and values as queries
                    parts = [(kind == part).nonzero().flatten() for part in range(3)]
                w.mul_(1 - lr * o.muon_weight_decay)
                for rows in parts:
                    scale = max(len(rows), w.shape[1]) ** 0.5
                    w[rows] -= (lr * scale * orthogonalised(q[rows])).float()
    return {"steps": results, "momenta": momenta, "lr": rate(steps) * o.muon_lr / o.lr}
