"""Activation recomputation: the same gradients from less memory, on a CPU as well."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from gpt_runs import GPT2, LENGTH, QWEN3, batch_of_step

from megatron_opus.config import ParallelConfig

DROPOUT = dataclasses.replace(GPT2, hidden_dropout=0.2, attention_dropout=0.1)


def of_rank(model: Any, recompute: str, sp: bool, documents: bool) -> dict[str, Any]:
    """Losses and gradients, and how many numbers autograd kept of the forward pass."""
    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.model.gpt import build_gpt, forward_loss
    from megatron_opus.backends.model.parallel import init_parallel

    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sp)
    init_distributed(parallel)
    init_parallel(parallel, seed=3)
    gpt = build_gpt(model, seq_length=LENGTH, seed=11, sequence_parallel=sp, recompute=recompute)  # type: ignore[arg-type]
    batch = batch_of_step(0, size=3)
    if documents:
        ids = (torch.arange(LENGTH) >= 6).int().expand(3, LENGTH)
        batch = dataclasses.replace(batch, document_ids=ids)
    kept = 0

    def count(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if isinstance(x, torch.nn.Parameter) else x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        losses = forward_loss(gpt, batch)
    (losses * batch.loss_mask).sum().backward()
    after = torch.rand(1)  # the generator stands where it would without recomputation
    gradients = {n: p.grad.clone() for n, p in gpt.named_parameters() if p.grad is not None}
    return {"losses": losses.detach(), "gradients": gradients, "kept": kept, "after": after}


CASES = {
    "gpt2": (GPT2, False, False),
    "dropout": (DROPOUT, True, False),
    "qwen3_sequence_parallel": (QWEN3, True, False),
    "qwen3_documents": (QWEN3, False, True),
}


@pytest.mark.parametrize("case", CASES)
def test_recomputed_layers_give_the_same_gradients(world2: Any, case: str) -> None:
    """Fault: dropout drawn anew in the second forward pass, documents that see each other in it, a switch that saves
    nothing. Bit for bit: the same kernels see the same numbers."""
    model, sp, documents = CASES[case]
    plain = world2.run(of_rank, model, "none", sp, documents)
    again = world2.run(of_rank, model, "full", sp, documents)
    for one, two in zip(plain, again, strict=True):
        assert torch.equal(one["losses"], two["losses"])
        assert torch.equal(one["after"], two["after"])
        assert set(one["gradients"]) == set(two["gradients"])
        for name, gradient in one["gradients"].items():
            assert torch.equal(gradient, two["gradients"][name]), name
        assert two["kept"] < 0.5 * one["kept"]
