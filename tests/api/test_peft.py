"""`megatron_opus.score` on models that PEFT has put adapters into; skipped where PEFT is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_oracle import VOCAB, alignment, found, relative, tokens

from megatron_opus.api import as_batch
from megatron_opus.errors import Refusal
from megatron_opus.scoring.capture import CaptureError

peft = pytest.importorskip("peft")


def adapted(gpt2: bool = False, **settings: Any) -> Any:
    """A small Qwen3, or a GPT-2 with its Conv1D, whose adapters are no longer zero."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    if gpt2:
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64))
        targets = ["c_attn"]
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64}
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, tie_word_embeddings=False, **shape))
        targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def oracle(model: Any, candidates: torch.Tensor, proxy: torch.Tensor) -> torch.Tensor:
    """Inner products of the gradients of the adapters' matrices, one sequence at a time."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2}
    assert weights
    model.eval()
    return alignment(
        lambda batch: model(input_ids=batch.tokens).logits.float(), weights, as_batch(candidates), as_batch(proxy)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("gpt2", [False, True])
def test_lora_is_scored(gpt2: bool, checkpointing: bool) -> None:
    """Guards against frozen base weights that are scored instead of the adapters, and against gradient checkpointing,
    with which PEFT makes the embedding's output need a gradient."""
    model = adapted(gpt2)
    candidates, proxy = tokens(5), tokens(3, seed=4)
    want = oracle(model, candidates, proxy)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()
    got = found(model, candidates, proxy)
    assert relative(got.alignment, want) < 1e-5
    assert got.coverage == 1.0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}])
def test_other_adapters_are_right_or_refused(settings: dict[str, Any]) -> None:
    """Guards against adapters whose weights are read past the layer's own forward (DoRA's norms), silently."""
    model = adapted(**settings)
    candidates, proxy = tokens(5), tokens(3, seed=4)
    want = oracle(model, candidates, proxy)
    refused = ""
    try:
        got = found(model, candidates, proxy)
    except (Refusal, CaptureError) as error:
        refused = str(error)
    assert "lora" in refused if refused else relative(got.alignment, want) < 1e-5
