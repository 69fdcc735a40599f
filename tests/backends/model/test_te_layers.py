"""Transformer Engine's own linear layers, on a GPU: what hooks see of them is autograd's gradient."""

from __future__ import annotations

import pytest
import torch
from gpt_runs import LENGTH, VOCAB
from small_models import random_batch

import megatron_opus
from megatron_opus.backends.model.extras import detect_transformer_engine
from megatron_opus.config import ParallelConfig, SelectionConfig, SketchConfig

pytestmark = pytest.mark.skipif(
    detect_transformer_engine().status != "verified", reason="needs Transformer Engine and a GPU"
)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_every_matrix_has_autograds_gradient(normalization: str) -> None:
    """Guards against layers of the real Transformer Engine that are not recognised or read before their norm. `score`
    compares every matrix with autograd by itself, and raises where one differs."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.model.parallel import init_parallel

    init_distributed(ParallelConfig())
    init_parallel(ParallelConfig())
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        normalization=normalization,
        gradient_accumulation_fusion=False,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selection = SelectionConfig(sketch=SketchConfig(dim=256, one_sided_dim=12), score_length=LENGTH)
    candidates, proxy = random_batch(4, LENGTH, seed=1).to("cuda"), random_batch(2, LENGTH, seed=2).to("cuda")
    found = megatron_opus.score(model, candidates, proxy, optimizer, config=selection)
    assert found.coverage is not None
    assert found.coverage > 0.5  # four matrices of each block
    assert found.finite is not None
    assert found.finite.all()
