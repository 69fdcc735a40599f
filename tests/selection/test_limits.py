"""Floors: what is guaranteed holds for every strategy and every buffer that can supply it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opus.config import ConfigError, FloorsConfig, SelectionConfig
from megatron_opus.config.strategies import check_floors
from megatron_opus.selection.limits import Floors
from megatron_opus.selection.strategies import build_strategy
from megatron_opus.types import Candidates, Signals

NAMES = ("a", "b", "c")
KINDS = ("random", "opus", "greats", "filter_then_weight", "high_ppl", "middle_ppl", "low_ppl")


def candidates(domains) -> Candidates:
    return Candidates(step=3, sample_ids=np.arange(len(domains)), domains=np.array(domains, dtype=np.int32))


def signals(n: int, seed: int) -> Signals:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 24, generator=g, dtype=torch.float64)
    align = features @ torch.randn(24, generator=g, dtype=torch.float64)
    return Signals(alignment=align, interaction=features @ features.T, loss=torch.rand(n, generator=g).double())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    domains=st.lists(st.integers(0, 2), min_size=8, max_size=14),
    minimum=st.fixed_dictionaries({"a": st.sampled_from([0.0, 0.25, 0.4]), "b": st.sampled_from([0.0, 0.3, 0.5])}),
    high=st.sampled_from([0.5, 0.75, 1.0]),
    seed=st.integers(0, 99),
)
def test_floors_hold_wherever_the_buffer_can_supply_them(kind, domains, minimum, high, seed):
    """Fault: a strategy that ignores the limits, an unsupplied floor called a breach, or a maximum that is exceeded
    although other candidates were left."""
    k, n = 6, len(domains)
    floors = FloorsConfig(minimum=minimum, maximum={"c": high})
    strategy = build_strategy(SelectionConfig(strategy=kind, floors=floors), NAMES)
    selection = strategy.select(candidates(domains), signals(n, seed), k, torch.Generator().manual_seed(seed))
    assert len(set(selection.indices.tolist())) == k
    held, taken = np.bincount(domains, minlength=3), np.bincount(np.array(domains)[selection.indices], minlength=3)
    low = [int(np.ceil(minimum[name] * k - 1e-9)) for name in "ab"]
    missing = 0
    for d, asked in enumerate(low):
        assert taken[d] >= min(asked, held[d])
        missing += max(0, asked - held[d])
    assert selection.diagnostics["floors_unsupplied"] == missing
    assert selection.diagnostics["floors_breached"] == 0
    room = int(np.floor(high * k + 1e-9))
    forced = max(0, k - held[0] - held[1] - min(room, held[2]))
    assert max(0, taken[2] - room) == selection.diagnostics["floors_exceeded"] == forced
    assert bool(strategy.notices()) == bool(missing)
    assert strategy.notices() == []


@pytest.mark.parametrize("kind", KINDS)
def test_limits_that_bind_nothing_change_nothing(kind):
    """Fault: floors that alter the draw, or take other random numbers, where they are met anyway."""
    domains = [0, 1, 2] * 4
    free = build_strategy(SelectionConfig(strategy=kind), NAMES)
    loose = build_strategy(SelectionConfig(strategy=kind, floors=FloorsConfig(maximum={"a": 1.0})), NAMES)
    drawn = [
        s.select(candidates(domains), signals(12, 5), 6, torch.Generator().manual_seed(1)).indices
        for s in (free, loose)
    ]
    assert torch.equal(*drawn)


def test_the_fallback_keeps_the_floors():
    """Fault: a step whose scores are NaN breaks the guarantee."""
    strategy = build_strategy(SelectionConfig(floors=FloorsConfig(minimum={"c": 0.5})), NAMES)
    broken = Signals(alignment=torch.full((12,), torch.nan).double(), interaction=torch.eye(12).double())
    for seed in range(10):
        drawn = strategy.select(candidates([0] * 9 + [2] * 3), broken, 6, torch.Generator().manual_seed(seed))
        assert drawn.fallback
        assert set(drawn.indices.tolist()) >= {9, 10, 11}


@pytest.mark.parametrize(
    ("floors", "expected"),
    [
        (FloorsConfig(minimum={"a": 0.6, "b": 0.5}), "asks for 7 of 6 sequences"),
        (FloorsConfig(minimum={"a": 0.34, "b": 0.34, "c": 0.34}), "asks for 9 of 6"),
        (FloorsConfig(minimum={"a": 0.5}, maximum={"a": 0.4}), "at least 3 and at most 2 of 6"),
        (FloorsConfig(maximum={"a": 0.3, "b": 0.3, "c": 0.3}), "leaves room for 3 of 6"),
        (FloorsConfig(minimum={"prosa": 0.1}), "no candidate domain 'prosa'"),
    ],
)
def test_infeasible_floors_are_refused(floors, expected):
    """Fault: a run that starts with limits which no selection can keep."""
    with pytest.raises(ConfigError, match=expected.replace("(", r"\(")):
        check_floors(floors, 6, NAMES)
    with pytest.raises(ConfigError):
        build_strategy(SelectionConfig(floors=floors), NAMES, k=6)


def test_a_floor_is_a_share():
    """Fault: 1.2 of the batch is asked for, which no selection can keep."""
    with pytest.raises(ConfigError, match=r"selection\.floors\.minimum\.a: expected 0 <= share <= 1, got 1\.2"):
        FloorsConfig(minimum={"a": 1.2})


def test_settings_with_floors_can_be_hashed():
    """Fault: a cache keyed by the selection's settings fails because two of them are mappings."""
    assert hash(SelectionConfig()) == hash(SelectionConfig())
    assert SelectionConfig(floors=FloorsConfig(minimum={"a": 0.1})) != SelectionConfig()


def test_an_unsupplied_floor_is_said_once_by_name():
    """Fault: a terminal flooded with the same line, or a missing domain that nobody hears of."""
    floors = Floors(FloorsConfig(minimum={"c": 0.5}), NAMES)
    for _ in range(3):
        floors.limits(candidates([0, 1, 2, 0, 1, 0]), 4)
    (line,) = floors.notices()
    assert "minimum of c asks for 1 sequences more" in line
