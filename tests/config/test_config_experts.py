"""Mixtures of experts that cannot run are refused, and the message says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opus.config import ConfigError, load, validate_world

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERTS = CONFIGS / "pretrain_qwen3_moe_tiny.yaml"
MEGATRON = "parallel.engine=megatron"
TP = "parallel.tensor_model_parallel_size=2"
EP = "parallel.expert_model_parallel_size"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"{EP}=2"], "expected 1 with parallel.engine deepspeed, got 2"),
        ([TP], "expected 1 with model.num_moe_experts under DeepSpeed, got 2"),
        ([MEGATRON, TP, f"{EP}=2"], "parallel.sequence_parallel: expected true"),
        ([MEGATRON, TP, "parallel.sequence_parallel=true"], "expected more than 1, and a multiple or a divisor"),
        ([MEGATRON, f"{EP}=3"], "expected a divisor of num_moe_experts"),
        (["model.moe_router_topk=1"], "expected 2 to num_moe_experts"),
        (["model.moe_router_topk=9"], "expected 2 to num_moe_experts"),
        (["model.add_bias_linear=true"], "expected false with num_moe_experts"),
        (["model.moe_shared_expert_gate=true"], "expected false without moe_shared_expert_intermediate_size"),
        (["model.num_moe_experts=null", MEGATRON, f"{EP}=2"], "expected 1 without model.num_moe_experts"),
        (["model.num_moe_experts=null", "model.moe_shared_expert_intermediate_size=8"], "expected null without"),
    ],
)
def test_what_cannot_run(overrides: list[str], said: str) -> None:
    """Guards against experts whose gradients are silently wrong, or that fail deep inside of Megatron."""
    with pytest.raises(ConfigError, match=said):
        load(EXPERTS, overrides)


def test_processes_that_do_not_hold_the_experts() -> None:
    """Guards against groups that Megatron makes of the wrong ranks."""
    config = load(EXPERTS, [MEGATRON, f"{EP}=4"])
    with pytest.raises(ConfigError, match="expected a divisor of the 2 processes"):
        validate_world(config, 2)
    validate_world(config, 4)
