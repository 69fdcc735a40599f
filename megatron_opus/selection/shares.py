"""Domain shares of the buffer between their bounds."""

from __future__ import annotations

import numpy as np

from megatron_opus.config import ConfigError


def share_bounds(
    prior: np.ndarray, min_share: float, ceiling: np.ndarray | None, owed: np.ndarray | None, *, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return ([D] least, [D] largest share) of a mixture that moves; a domain without a prior has no share.

    prior [D], sum 1: the configured weights; ceiling [D]: the shares that each domain has sequences for; owed [D]: the
    shares that the floors of the selection need in the buffer, kept where they fit together. Raises ConfigError, which
    names `key`, where `min_share` of every domain is more than the whole.
    """
    floor = np.where(prior > 0, min_share, 0.0)
    if floor.sum() > 1:
        raise ConfigError(
            f"{key}.min_share: {min_share} for each of {int((prior > 0).sum())} domains is more than the whole; lower "
            "it"
        )
    top = np.ones(len(prior)) if ceiling is None else np.clip(ceiling, 0.0, 1.0)
    # what is configured is allowed, or the buffer would have refused it
    largest = np.where(prior > 0, np.maximum(top, prior), 0.0)
    supplied = np.minimum(np.maximum(floor, 0.0 if owed is None else owed), largest)
    return (supplied if supplied.sum() <= 1 else floor), largest


def clipped(shares: np.ndarray, floor: np.ndarray, ceiling: np.ndarray) -> np.ndarray:
    """[D] sum 1 with floor <= result <= ceiling: the shares scaled by one factor, then cut off at the bounds.

    floor.sum() <= 1 <= ceiling.sum() is required. The factor is found by bisection: the sum grows with it. What the
    ceilings keep from shares of (almost) nothing else goes to the room that is left.
    """
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(middle * shares, floor, ceiling).sum() < 1:
            low = middle
        else:
            high = middle
    result = np.clip(high * shares, floor, ceiling)
    missing, room = 1 - result.sum(), ceiling - result
    return result + room * (missing / room.sum()) if missing > 0 and room.sum() > 0 else result / result.sum()
