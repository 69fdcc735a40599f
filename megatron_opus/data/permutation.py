"""Compute pseudo-random numbers as functions of their keys: there is no state to save, and every machine agrees.

`permute` gives any position of a shuffled range without building the shuffle, so that the order of 10^8 sequences
costs no memory and a resumed run needs a cursor only. NumPy's own generators are not used because their streams may
change between releases, and a resumed run must draw the same sequences.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6
_MINIMAL_HALF_BITS = 4  # below 256 values a Feistel network mixes badly; the cycle walk then takes some more turns


def key(*parts: int | str) -> int:
    """Hash the parts to 64 bits. They depend on every part, on the order and on the types: 1 and "1" differ."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(*parts: int | str) -> float:
    """Compute a number in [0, 1) with 53 random bits from the key made of `parts`."""
    return (key(*parts) >> 11) / float(1 << 53)


def permute(positions: np.ndarray, size: int, permutation_key: int) -> np.ndarray:
    """Send `positions` through a keyed permutation of 0 .. size - 1.

    Takes and returns [n] int64. Sending all of 0 .. size - 1 gives each of them once, in a shuffled order. The method
    is a balanced Feistel network on the next even power of two. It is walked until the value falls below `size`, which
    takes at most 4 turns on average, and more for very small ranges.
    Raises ValueError for a position outside of the range.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and (positions.min() < 0 or positions.max() >= size):
        raise ValueError(f"positions must be in 0..{size - 1}, got {positions.min()}..{positions.max()}")
    half_bits = max(_MINIMAL_HALF_BITS, ((max(size, 2) - 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(key(permutation_key, turn)) for turn in range(_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(values >= np.uint64(size))
    # a small range is walked for many turns (8 values: 32 turns on average), so in a table of all of them
    small = outside.size and half_bits == _MINIMAL_HALF_BITS
    table = _feistel(np.arange(1 << 2 * half_bits, dtype=np.uint64), half_bits, round_keys) if small else None
    while outside.size:
        walked = _feistel(values[outside], half_bits, round_keys) if table is None else table[values[outside]]
        values[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, round_keys: list[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
