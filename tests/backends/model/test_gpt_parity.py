"""The sharded GPT against the whole one, and the whole one against a GPT-2 written out in torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from gpt_runs import GPT2, LENGTH, QWEN3, VOCAB, batch_of_step
from torch import Tensor
from torch.nn import functional

from megatron_opus.config import ConfigError, ModelConfig, ParallelConfig
from megatron_opus.types import Batch

# Untied GPT-2 and tied Qwen3 shapes: together with the defaults, both kinds of both.
MODELS = {
    "gpt2": GPT2,
    "gpt2_untied": dataclasses.replace(GPT2, untie_embeddings_and_output_weights=True),
    "qwen3": QWEN3,
    "qwen3_tied": dataclasses.replace(QWEN3, untie_embeddings_and_output_weights=False, qk_layernorm=False),
}


def example(documents: bool) -> Batch:
    batch = batch_of_step(0, size=3)
    if not documents:
        return batch
    ids = torch.stack([(torch.arange(LENGTH) >= 4 + 5 * z).int() for z in range(3)])
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(LENGTH - n)]) for n in (4, 9, 14)])
    return dataclasses.replace(batch, document_ids=ids, position_ids=positions)


def of_rank(
    model: ModelConfig, tp: int, *, sp: bool = False, documents: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Token losses, and weights and gradients of this rank with the place of each in the whole parameter."""
    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.model.gpt import build_gpt, forward_loss
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.layout.model_layout import model_layout

    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sp)
    init_distributed(parallel)
    groups = init_parallel(parallel)
    gpt = build_gpt(model, seq_length=LENGTH, seed=11, sequence_parallel=sp, params_dtype=dtype)
    batch = example(documents)
    losses = forward_loss(gpt, batch)
    (losses * batch.loss_mask).sum().div(batch.loss_mask.sum()).backward()
    pieces = {}
    layout = model_layout(model, tp_size=tp, positions=LENGTH)
    for name, p in gpt.named_parameters():
        place = None
        if layout[name].cut is not None:
            place = (layout[name].shape, *layout.shard(name, groups.tp_rank))
        assert p.grad is not None, name
        pieces[name] = (place, p.detach().float().numpy(), p.grad.float().numpy())
    return {"losses": losses.detach().numpy(), "dtype": str(losses.dtype), "pieces": pieces}


def whole(results: list[dict[str, Any]], name: str, which: int) -> np.ndarray:
    """One parameter's value (1) or gradient (2) put together from the tensor-parallel ranks' pieces."""
    place, *_ = results[0]["pieces"][name]
    if place is None:
        values = [r["pieces"][name][which] for r in results]
        for other in values[1:]:
            np.testing.assert_allclose(other, values[0], rtol=1e-4, atol=1e-7, err_msg=f"{name} differs between ranks")
        return values[0]
    shape = place[0]
    out = np.full(shape, np.nan)
    for result in results:
        (_, rows, *columns), *tensors = result["pieces"][name]
        at = 0
        for start, length in rows:
            piece = tensors[which - 1][at : at + length]
            at += length
            if out.ndim == 1:
                out[start : start + length] = piece
            else:
                across = 0
                for first, width in columns[0]:
                    out[start : start + length, first : first + width] = piece[:, across : across + width]
                    across += width
    assert np.isfinite(out).all()
    return out


CASES = [(m, tp, sp, d) for m in MODELS for tp, sp, d in ((2, False, False), (4, True, True))]


@pytest.mark.parametrize(("model", "tp", "sp", "documents"), CASES)
def test_shards_add_up(world4: Any, model: str, tp: int, sp: bool, documents: bool) -> None:
    """Initial weights drawn per shard, gate and up cut as one, a norm's partial gradient: another model per degree.

    Relative to the largest entry of each gradient: 1e-5 is some twenty roundings of fp32.
    """
    one = world4.run(of_rank, MODELS[model], 1, documents=documents)[:1]
    many = world4.run(of_rank, MODELS[model], tp, sp=sp, documents=documents)[:tp]
    for result in many:
        np.testing.assert_allclose(result["losses"], one[0]["losses"], rtol=1e-5)
    assert set(many[0]["pieces"]) == set(one[0]["pieces"])
    for name in one[0]["pieces"]:
        np.testing.assert_array_equal(whole(many, name, 1), whole(one, name, 1), err_msg=f"weight {name}")
        want = whole(one, name, 2)
        np.testing.assert_allclose(
            whole(many, name, 2), want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=f"gradient {name}"
        )


def plain_gpt2(weights: dict[str, Tensor], batch: Batch, heads: int, layers: int) -> Tensor:
    """GPT-2 (Radford et al. 2019): pre-norm, learned positions, tanh GELU, tied output; token losses [B, L]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = weights["embedding.word_embeddings.weight"][batch.tokens]
    x = x + weights["embedding.position_embeddings.weight"][batch.position_ids]
    b, s, h = x.shape
    allowed = torch.ones(s, s).tril().bool()
    if batch.document_ids is not None:
        allowed = allowed & (batch.document_ids[:, :, None] == batch.document_ids[:, None, :])[:, None]
    for i in range(layers):
        layer = f"decoder.layers.{i}"
        qkv = linear(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attention.linear_qkv")
        # Megatron's order: (query, key, value) of head 0, of head 1, ...
        q, k, v = qkv.view(b, s, heads, 3, h // heads).permute(3, 0, 2, 1, 4)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(h // heads)).masked_fill(~allowed, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, h)
        x = x + linear(y, f"{layer}.self_attention.linear_proj")
        y = linear(norm(x, f"{layer}.pre_mlp_layernorm"), f"{layer}.mlp.linear_fc1")
        x = x + linear(functional.gelu(y, approximate="tanh"), f"{layer}.mlp.linear_fc2")
    # Rows that only fill up the vocabulary are no tokens: probability 0.
    logits = norm(x, "decoder.final_layernorm") @ weights["embedding.word_embeddings.weight"][: GPT2.vocab_size].T
    return functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")


@pytest.mark.parametrize("documents", [False, True])
def test_against_gpt2_written_out(world2: Any, documents: bool) -> None:
    """Labels shifted a second time, the exact GELU, positions that do not restart: all train, none is GPT-2."""
    # Weights so large that activations leave the range in which both GELUs are the same to five digits.
    model = dataclasses.replace(GPT2, init_method_std=0.3)
    result, *_ = world2.run(of_rank, model, 1, documents=documents)
    weights = {n: torch.from_numpy(w).double() for n, (_, w, _) in result["pieces"].items()}
    want = plain_gpt2(weights, example(documents), GPT2.num_attention_heads, GPT2.num_layers)
    np.testing.assert_allclose(result["losses"], want.numpy(), rtol=2e-5)
    assert weights["embedding.word_embeddings.weight"].shape == (VOCAB, GPT2.hidden_size)


def test_initial_weights(world2: Any) -> None:
    """Residual output layers scale with 1 / sqrt(2 layers); a wrong one trains, and diverges at 48 layers."""
    model = dataclasses.replace(GPT2, hidden_size=128)
    pieces = world2.run(of_rank, model, 1)[0]["pieces"]
    for name, (_, weight, _) in pieces.items():
        if weight.ndim < 2:
            assert (weight == (1.0 if name.endswith("norm.weight") else 0.0)).all(), name
        else:
            residual = "linear_proj" in name or "linear_fc2" in name
            assert weight.std() == pytest.approx(0.02 / (2 if residual else 1), rel=0.05), name
    layers = [pieces[f"decoder.layers.{i}.mlp.linear_fc1.weight"][1] for i in range(2)]
    assert not np.array_equal(*layers)


def test_bf16_losses_are_float32(world2: Any) -> None:
    """A cross entropy in bf16 has steps of 0.03 at a loss of 4: no curve, and no ranking of candidates."""
    full, *_ = world2.run(of_rank, GPT2, 2, documents=True)
    half, *_ = world2.run(of_rank, GPT2, 2, documents=True, dtype=torch.bfloat16)
    assert half["dtype"] == "torch.float32"
    np.testing.assert_allclose(half["losses"], full["losses"], rtol=5e-3)


def errors_of_rank() -> list[str]:
    from megatron_opus.backends.model.gpt import build_gpt, forward_loss
    from megatron_opus.backends.model.parallel import init_parallel

    found = []
    init_parallel(ParallelConfig(tensor_model_parallel_size=2))
    with pytest.raises(ConfigError) as config_error:
        build_gpt(dataclasses.replace(GPT2, num_attention_heads=1), seq_length=LENGTH)
    found.append(str(config_error.value))
    for model, length, sp in ((GPT2, LENGTH // 2, False), (QWEN3, LENGTH, True)):
        gpt = build_gpt(model, seq_length=length, sequence_parallel=sp)
        with pytest.raises(ValueError, match="sequence length") as value_error:
            forward_loss(gpt, example(False).window(LENGTH - 1))
        found.append(str(value_error.value))
    return found


def test_what_does_not_fit_is_said(world2: Any) -> None:
    """An odd length under sequence parallelism fails deep in a collective, on some ranks only."""
    degree, positions, odd = world2.run(errors_of_rank)[0]
    assert degree.endswith("possible: 1")
    assert positions == "sequence length: expected at most 8 positions, got 15"
    assert "expected a multiple of tensor_model_parallel_size (2) under sequence parallelism, got 15" in odd


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_against_cpu() -> None:
    """Fused kernels that compute another function than the CPU's (the tanh GELU, dropout off)."""
    import torch.distributed as dist

    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.model.gpt import build_gpt, forward_loss
    from megatron_opus.backends.model.parallel import init_parallel

    device = init_distributed(ParallelConfig())
    init_parallel(ParallelConfig())
    for model in (GPT2, QWEN3):
        gpt = build_gpt(model, seq_length=LENGTH, seed=11)
        losses = forward_loss(gpt, example(False).to(device))
        weights = {n: p.detach().cpu().double() for n, p in gpt.named_parameters()}
        if model is GPT2:
            want = plain_gpt2(weights, example(False), model.num_attention_heads, model.num_layers)
            torch.testing.assert_close(losses.cpu().double(), want, rtol=1e-4, atol=1e-4)
        losses.mean().backward()
    dist.destroy_process_group()
