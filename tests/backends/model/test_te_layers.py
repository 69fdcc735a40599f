"""Transformer Engine's own linear layers, on a GPU: what hooks see of them is autograd's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpt_runs import LENGTH, VOCAB
from partitions import relative
from small_models import random_batch

import megatron_opus
from megatron_opus.backends.model.extras import detect_transformer_engine
from megatron_opus.config import ParallelConfig, SelectionConfig, SketchConfig
from megatron_opus.types import Signals

pytestmark = pytest.mark.skipif(
    detect_transformer_engine().status != "verified", reason="needs Transformer Engine and a GPU"
)


CASES: dict[str, dict[str, Any]] = {
    "LayerNorm": {"normalization": "LayerNorm"},
    "RMSNorm": {"normalization": "RMSNorm"},
    "grouped experts": {
        "normalization": "RMSNorm", "num_moe_experts": 4, "moe_ffn_hidden_size": 64, "moe_router_topk": 2,
        "moe_grouped_gemm": True, "add_bias_linear": False,
    },
}  # fmt: skip


def scored(case: str, precision: Any = "model") -> Signals:
    """Scores of a model of Transformer Engine's layers. `score` compares every matrix with autograd by itself, and
    raises where one differs."""
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
        gradient_accumulation_fusion=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        **CASES[case],
    )
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    torch.manual_seed(0)
    model = GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=VOCAB, max_sequence_length=LENGTH
    ).cuda()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selection = SelectionConfig(
        sketch=SketchConfig(dim=256, one_sided_dim=12), score_length=LENGTH, score_precision=precision
    )
    candidates, proxy = random_batch(4, LENGTH, seed=1).to("cuda"), random_batch(2, LENGTH, seed=2).to("cuda")
    return megatron_opus.score(model, candidates, proxy, optimizer, config=selection)


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_has_autograds_gradient(case: str) -> None:
    """Guards against layers of the real Transformer Engine that are not recognised or read before their norm, and rows
    of grouped experts that are cut at other places."""
    found = scored(case)
    assert found.coverage is not None
    assert found.coverage > 0.5  # four matrices of each block
    assert found.finite is not None
    assert found.finite.all()


@pytest.mark.parametrize("case", ["LayerNorm", "RMSNorm"])
def test_a_pass_in_fp8(case: str) -> None:
    """Guards against a context of the real Transformer Engine that does nothing, or that its layers refuse."""
    if not torch.cuda.get_device_capability() >= (8, 9):
        pytest.skip("needs a GPU that computes in fp8")
    exact, low = scored(case), scored(case, "fp8")
    assert exact.alignment is not None
    assert low.alignment is not None
    assert 0 < relative(low.alignment, exact.alignment) < 0.3
