"""Means over seeds and their intervals."""

from __future__ import annotations

import math
import statistics

import pytest

from megatron_opus.studies.lab.intervals import interval


@pytest.mark.parametrize(
    ("count", "published"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262), (31, 2.042), (121, 1.980)]
)
def test_the_intervals_are_students(count, published):
    """Fault: the normal's 1.96 for three seeds, which halves the interval; a quantile of one side, 2.92."""
    values = [float(i % 7) for i in range(count)]
    expected = published * statistics.stdev(values) / math.sqrt(count)
    assert interval(values).half == pytest.approx(expected, rel=4e-4)


def test_intervals():
    """Fault: the population's deviation in place of the sample's, or an interval made up for a single seed."""
    found = interval([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.3027 * statistics.stdev([1.0, 2.0, 4.0]) / math.sqrt(3), rel=1e-4)
    assert interval([5.0]).half is None
    assert interval([5.0]).text() == "5.0000"
    assert interval([]) is None
