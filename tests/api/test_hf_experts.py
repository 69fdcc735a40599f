"""`megatron_opus.score` on Hugging Face's Qwen3-MoE and Mixtral: every expert against autograd."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from plain_oracle import VOCAB, relative, tokens

import megatron_opus
from megatron_opus.api import as_batch
from megatron_opus.backends.engines.optimizer_state import optimizer_state
from megatron_opus.config import PreconditionerConfig, RedundancyConfig, SelectionConfig, SketchConfig
from megatron_opus.selection import reference

N, LENGTH, EXPERTS = 5, 12, 6
EXACT = SelectionConfig(
    sketch=SketchConfig(alignment="direction"),
    preconditioner=PreconditionerConfig(form="exact"),
    redundancy=RedundancyConfig(scale="off"),
    score_length=LENGTH,
)


def build(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"max_position_embeddings": 64, "vocab_size": VOCAB, "tie_word_embeddings": False}
    if kind == "mixtral":
        config = transformers.MixtralConfig(**shape, intermediate_size=24, num_local_experts=EXPERTS)
    else:
        config = transformers.Qwen3MoeConfig(
            **shape, head_dim=12, intermediate_size=48, moe_intermediate_size=24, num_experts=EXPERTS,
            num_experts_per_tok=2, norm_topk_prob=True,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # as it is made, all tokens take nearly the same experts
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.15)
    return model.eval()


def losses(model: Any, batch: Any) -> Any:
    logits = model(batch.tokens).logits.float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")


def trained(kind: str) -> tuple[Any, Any]:
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    for step in range(2):
        losses(model, as_batch(tokens(4, seed=20 + step))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def oracle(model: Any, optimizer: Any) -> torch.Tensor:
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and "lm_head" not in n}
    gradients = [
        reference.per_sequence_gradients(lambda b: losses(model, b), as_batch(batch), weights)
        for batch in (tokens(N), tokens(3, seed=4))
    ]
    state = optimizer_state(optimizer)
    hypers = dict(zip(weights, state.hypers(list(weights.values())), strict=True))
    moments = {name: optimizer.state[weight]["exp_avg_sq"] for name, weight in weights.items()}
    return reference.scores(*gradients, reference.adamw_preconditioner(moments, hypers))[0]


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_every_expert_enters_the_score(kind: str) -> None:
    """Guards against experts and routers that are left out, rows given to other sequences, and the second moment of
    another expert. The first call compares every matrix with autograd through the model's own forward."""
    model, optimizer = trained(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scorer = megatron_opus.build_scorer(model, optimizer, config=EXACT)
    found = scorer(as_batch(tokens(N)), as_batch(tokens(3, seed=4)), interaction=False)
    assert "were compared with autograd's" in scorer.verified
    assert relative(found.alignment, oracle(model, optimizer)) < 1e-5
    assert len([x for x in scorer.layers if x.routing is not None]) == 2 * 2 * EXPERTS
    assert found.expert_load is not None
    assert found.expert_load.shape == (N, 2, EXPERTS)
    assert (found.expert_load.sum(2) == 2 * LENGTH).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules() if "Experts" in type(m).__name__)


def test_another_experts_state_is_seen() -> None:
    """Guards against the test above being blind to which expert's second moment is read."""
    from megatron_opus.types import Fragment

    model, optimizer = trained("qwen3_moe")
    true = Fragment.within
    with mock.patch.object(Fragment, "within", lambda self, first, size: true(self, 0, size)):
        found = megatron_opus.score(model, tokens(N), tokens(3, seed=4), optimizer, config=EXACT, interaction=False)
    assert relative(found.alignment, oracle(model, optimizer)) > 1e-3
