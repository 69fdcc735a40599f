from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opus.data.permutation import key, permute, uniform


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), permutation_key=st.integers(0, 2**64 - 1))
def test_bijection(size: int, permutation_key: int) -> None:
    """Guards against an order that offers a sequence twice in an epoch and another never."""
    order = permute(np.arange(size), size, permutation_key)
    assert np.array_equal(np.sort(order), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 10**12), permutation_key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_lookup_does_not_depend_on_its_neighbours(size: int, permutation_key: int, data: st.DataObject) -> None:
    """Guards against a resumed run (other slices of the order) reading other sequences."""
    start = data.draw(st.integers(0, size - 1))
    positions = np.arange(start, min(size, start + 20))
    together = permute(positions, size, permutation_key)
    one_by_one = np.concatenate([permute(positions[i : i + 1], size, permutation_key) for i in range(len(positions))])
    assert np.array_equal(together, one_by_one)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < size


def test_order_is_the_published_one() -> None:
    """Guards against a silent change of the order: checkpoints of earlier versions would resume on other data."""
    assert permute(np.arange(8), 8, 42).tolist() == [5, 6, 2, 0, 3, 7, 1, 4]
    large = permute(np.arange(4), 10**8, key("candidates", 1, "a", 0))
    assert large.tolist() == [
        98717681,
        94862560,
        65348784,
        60948348,
    ]


def test_looks_uniform() -> None:
    """Guards against a weak mix: neighbouring sequences staying together, or one part of a domain coming first.

    Each of 64 cells of (position block, value block) expects 4096 / 64 = 64 of the 4096 values, standard deviation
    below 8; 5 of those make a false alarm one in a million per cell, and the key is fixed.
    """
    order = permute(np.arange(4096), 4096, 7)
    cells = np.zeros((8, 8))
    np.add.at(cells, (np.arange(4096) // 512, order // 512), 1)
    assert np.abs(cells - 64).max() < 40
    assert abs(np.corrcoef(np.arange(4096), order)[0, 1]) < 5 / 64
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.01


def test_uniform_numbers() -> None:
    """Guards against a count offset that is biased, which would shift the mixture of domains.

    2000 draws: standard error of the mean 1 / sqrt(12 * 2000) = 0.0065; 5 of them.
    """
    values = np.array([uniform("counts", 3, step) for step in range(2000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 5 * 0.0065
    assert uniform(1, "2") != uniform("1", 2)
