"""What a field takes, whether the value comes from YAML or from Python."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from config_numbers import MAPPINGS, numeric

from megatron_opus.config import (
    AdoConfig,
    ConfigError,
    DataConfig,
    FilterThenWeightConfig,
    OptimizerConfig,
    PreconditionerConfig,
    RedundancyConfig,
    SelectionConfig,
    SketchConfig,
    from_dict,
    to_dict,
)
from megatron_opus.config.schema import Bound
from megatron_opus.runs.checkpoints import settings_that_differ

SMALL: dict[str, Any] = {"name": "x", "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}}


def set_to(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    raw = to_dict(from_dict(SMALL))
    node = raw
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = {"a": value} if path[-1] in MAPPINGS else value
    return raw


@pytest.mark.parametrize(("path", "kind", "bounds"), numeric(), ids=[".".join(path) for path, _, _ in numeric()])
def test_every_number_is_bounded(path: tuple[str, ...], kind: type, bounds: tuple[Any, ...]) -> None:
    """Guards against a number that a dry run takes and that ends in a traceback at step 0: NaN, 1e30 layers."""
    assert [type(bound) for bound in bounds] == [Bound]
    assert math.isfinite(bounds[0].low)
    assert math.isfinite(bounds[0].high)
    bad: list[Any] = [10**18, -(10**18), 10**400]
    if kind is float:
        bad += [math.nan, math.inf, -math.inf, 1e300]
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            from_dict(set_to(path, value))
        assert str(caught.value).startswith(".".join(path)), str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SelectionConfig(rho=2), "selection.rho: expected 0 < rho <= 1, got 2.0"),
        (lambda: SelectionConfig(rho=math.nan), "selection.rho: expected 0 < rho <= 1, got nan"),
        (lambda: SelectionConfig(strategy="opsu"), "selection.strategy: expected one of opus"),
        (lambda: SelectionConfig(sketch={"dim": 4}), "selection.sketch: expected SketchConfig"),
        (
            lambda: SelectionConfig(scored_layers="last:0"),
            "selection.scored_layers: expected all, none, last:K or every:K",
        ),
        (lambda: SelectionConfig(score_windows=True), "selection.score_windows: expected int, got True"),
        (lambda: SketchConfig(dim=-1), "selection.sketch.dim: expected a positive number, got -1"),
        (lambda: SketchConfig(dim=2.0), "selection.sketch.dim: expected int, got 2.0 (float)"),
        (lambda: SketchConfig(dim=10**12), "selection.sketch.dim: expected at most 67,108,864"),
        (lambda: PreconditionerConfig(kind="adam"), "selection.preconditioner.kind: expected one of auto"),
        (lambda: RedundancyConfig(fraction=-1), "selection.redundancy.fraction: expected >= 0, got -1.0"),
        (
            lambda: AdoConfig(skip_steps=9, first_fit=9),
            "selection.ado.skip_steps: expected 0 <= skip_steps < first_fit",
        ),
        (lambda: FilterThenWeightConfig(tolerance=0), "selection.filter_then_weight.tolerance: expected 0 < tolerance"),
        (lambda: OptimizerConfig(lr=1.0, min_lr=2.0), "optimizer.lr: expected 0 <= min_lr <= lr, got 2.0, 1.0"),
        (lambda: DataConfig(path=""), "data.path: expected printable text, got ''"),
        (lambda: DataConfig(path="a\0b"), "data.path: expected printable text"),
        (
            lambda: SelectionConfig(proxy_momentum=0.5, sketch=SketchConfig(alignment="direction")),
            "selection.proxy_momentum: an average needs the proxy in sketch",
        ),
        (
            lambda: SelectionConfig(strategy="greats", preconditioner=PreconditionerConfig(kind="adamw")),
            "selection.preconditioner.kind: greats scores in SGD's geometry",
        ),
        (
            lambda: dataclasses.replace(SelectionConfig(strategy="high_ppl"), score_windows=2),
            "selection.score_windows: high_ppl scores the first window only",
        ),
    ],
)
def test_settings_made_in_python_are_checked(make: Any, said: str) -> None:
    """Guards against `score(config=SelectionConfig(rho=2))` that selects by settings which YAML would refuse."""
    with pytest.raises(ConfigError) as caught:
        make()
    assert said in str(caught.value)


def test_whole_numbers_for_floats_become_floats() -> None:
    """Guards against a config.yaml that differs with how a value was typed in Python."""
    assert isinstance(SelectionConfig(temperature=1).temperature, float)
    assert SelectionConfig(temperature=1) == dataclasses.replace(SelectionConfig(), temperature=1.0)


@pytest.mark.parametrize("name", [".", "..", ".x", "-x", "a/b", "", "a\nb", "a" * 300, "a b"])
def test_a_run_has_a_name_and_not_a_path(name: str) -> None:
    """Guards against `name=..`, which writes a run over the folder of all runs."""
    with pytest.raises(ConfigError, match="name: expected"):
        from_dict({**SMALL, "name": name})
    assert from_dict({**SMALL, "name": "a..b-1_C"}).name == "a..b-1_C"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"selection": {"rho": 1e-6}}, "selection.rho: expected training.global_batch_size / rho of at most 1,000,000"),
        ({"selection": {"score_windows": 3}}, "selection.score_windows: expected at most 2 windows of 512 tokens"),
        ({"model": {"position_embedding_type": "rope", "kv_channels": 3}}, "model.kv_channels: rope rotates pairs"),
        (
            {
                "parallel": {"sequence_parallel": True, "tensor_model_parallel_size": 2},
                "selection": {"score_length": 511},
            },
            "selection.score_length: sequence_parallel splits it; expected a multiple",
        ),
        ({"parallel": {"zero_stage": 1.0}}, "parallel.zero_stage: expected one of 0, 1, 2, 3, got 1.0"),
    ],
)
def test_what_would_end_at_step_0_is_refused(sections: dict[str, Any], said: str) -> None:
    """Guards against a dry run that accepts what the first pass cannot do."""
    with pytest.raises(ConfigError) as caught:
        from_dict({**SMALL, **sections, "model": {**SMALL["model"], **sections.get("model", {})}})
    assert said in str(caught.value)


def test_removed_keys_say_what_to_do() -> None:
    """Guards against runs of earlier versions that are read with another meaning, or not at all."""
    old = to_dict(from_dict(SMALL))
    old["selection"]["layer_weights"] = "none"  # means what is done now
    assert from_dict(old) == from_dict(SMALL)
    assert settings_that_differ(old, from_dict(SMALL)) == []  # --resume goes on
    old["selection"]["layer_weights"] = "inverse_sqrt"
    with pytest.raises(
        ConfigError, match=r"selection\.layer_weights: 'inverse_sqrt' was removed, .*; leave the key out"
    ):
        from_dict(old)
    with pytest.raises(ConfigError, match=r"operator: tensor_sketch was removed; use two_stage"):
        from_dict({**SMALL, "selection": {"sketch": {"operator": "tensor_sketch"}}})
