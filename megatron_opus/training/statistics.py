"""Means over seeds with their 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interval:
    mean: float
    half: float | None  # half the width of the 95% interval; None: fewer than two values
    count: int

    @property
    def clear(self) -> bool:
        """The interval leaves out 0."""
        return self.half is not None and abs(self.mean) > self.half

    def text(self, digits: int = 4, sign: bool = False) -> str:
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval | None:
    """Mean and two-sided 95% Student t-interval of independent values; None without any."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean=mean, half=None, count=1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean=mean, half=t_quantile(n - 1) * deviation / math.sqrt(n), count=n)


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """t with P(|T| <= t) = level for Student's T of so many degrees of freedom, by bisection; |error| < 1e-9."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if _within(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t) for whole degrees of freedom: the finite sums in cos(theta), theta = atan(t / sqrt(freedom)).

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(freedom))
    cosine2 = math.cos(theta) ** 2
    odd = freedom % 2 == 1
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for j in range(freedom // 2):
        total += term
        term *= cosine2 * ((2 * j + 2) / (2 * j + 3) if odd else (2 * j + 1) / (2 * j + 2))
    sine_part = math.sin(theta) * total
    return 2 / math.pi * (theta + sine_part) if odd else sine_part
