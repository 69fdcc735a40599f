from __future__ import annotations

import pytest

from megatron_opus.backends.engines.schedule import learning_rate
from megatron_opus.config import ConfigError, OptimizerConfig


def test_warmup_and_cosine() -> None:
    """A warm-up from 0 wastes the first step, and its score would be taken at rate 0."""
    rate = learning_rate(OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_steps=4), 20)
    assert [rate(s) for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rate(12) == pytest.approx(0.55)
    assert all(a >= b for a, b in zip(map(rate, range(4, 20)), map(rate, range(5, 21)), strict=True))
    assert rate(20) == rate(99) == pytest.approx(0.1)


def test_every_step_has_a_rate() -> None:
    """The last step at rate 0 would be a step without an update."""
    rate = learning_rate(OptimizerConfig(lr=1.0, min_lr=0.0), 10)
    assert all(rate(s) > 0 for s in range(10))


def test_schedules_that_cannot_be() -> None:
    """A warm-up longer than the run never reaches the rate; a decay that ends early trains on at rate 0."""
    with pytest.raises(ConfigError, match=r"lr_warmup_steps: expected .* less than the 5 steps"):
        learning_rate(OptimizerConfig(lr=1.0, lr_warmup_steps=5), 5)
    with pytest.raises(ConfigError, match="last 4 would train at rate 0"):
        learning_rate(OptimizerConfig(lr=1.0, lr_decay_steps=6), 10)


def test_a_fraction_scales_with_the_run() -> None:
    """A recipe's 3,000 warm-up steps refuse a run of two steps; as a fraction they follow the length."""
    rate = learning_rate(OptimizerConfig(lr=1.0, lr_warmup_fraction=0.25), 8)
    assert [rate(s) for s in range(3)] == [0.5, 1.0, 1.0]
    assert learning_rate(OptimizerConfig(lr=1.0, lr_warmup_fraction=0.01), 2)(0) == 1.0
