"""Combinations of optimizer, ZeRO stage and geometry that are refused before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_opus.config import ConfigError, RunConfig, from_dict, validate_world


def config(**sections: dict[str, Any]) -> RunConfig:
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    return from_dict({"name": "x", "model": model, **sections})


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"parallel": {"zero_stage": 0, "offload_optimizer": "cpu"}}, "parallel.offload_optimizer: expected none at"),
        ({"optimizer": {"muon_momentum": 1.0}}, "optimizer.muon_momentum: expected 0 <= beta < 1, got 1.0"),
        ({"optimizer": {"sgd_momentum": -0.1}}, "optimizer.sgd_momentum: expected 0 <= beta < 1"),
        ({"optimizer": {"muon_lr": 0.0}}, "optimizer.muon_lr: expected > 0"),
        ({"optimizer": {"muon_weight_decay": -1.0}}, "optimizer.muon_weight_decay: expected >= 0"),
        (
            {"selection": {"preconditioner": {"kind": "muon"}}},
            "kind: muon needs state that optimizer.name adamw does not",
        ),
        (
            {"optimizer": {"name": "sgd"}, "selection": {"preconditioner": {"kind": "adamw"}}},
            "kind: adamw needs state that optimizer.name sgd does not keep; expected auto, sgd",
        ),
    ],
)
def test_what_cannot_run_is_refused_at_once(sections: dict[str, dict[str, Any]], expected: str) -> None:
    """Found out by DeepSpeed, or by the first scoring pass, after the data is prepared and the model built."""
    with pytest.raises(ConfigError) as caught:
        config(**sections)
    assert expected in str(caught.value)


@pytest.mark.parametrize("kind", ["auto", "adamw", "muon", "sgd"])
def test_every_geometry_fits_a_muon_run(kind: str) -> None:
    """Guards against refusing the geometry that discriminates best under Muon: AdamW's, by a moment of its own."""
    config(optimizer={"name": "muon"}, selection={"preconditioner": {"kind": kind}})


def test_muon_in_bf16_at_stage_1() -> None:
    """BF16_Optimizer refuses Muon beside tensor parallelism with a message that names no remedy."""

    def at(tp: int, zero: int, micro: int, name: str = "muon") -> RunConfig:
        return config(
            parallel={"tensor_model_parallel_size": tp, "zero_stage": zero},
            optimizer={"name": name},
            training={"precision": "bf16", "global_batch_size": 8, "micro_batch_size": micro},
        )

    with pytest.raises(ConfigError, match=r"set parallel.zero_stage=2, or raise micro_batch_size"):
        validate_world(at(2, 1, 2), 4)
    for fits in (at(2, 2, 2), at(2, 1, 4), at(1, 1, 2), at(2, 1, 2, "adamw")):
        validate_world(fits, 4)
