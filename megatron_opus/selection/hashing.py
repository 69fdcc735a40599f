"""Hashes as functions of (seed, layer name, side, global index): nothing is stored per parameter.

Every shard of a layer computes the hashes of its own part of the whole matrix from global coordinates, so that the
sum of the shards' sketches is the sketch of the unsharded matrix (method.md section 4). Layer order, shard sizes and
ranks do not enter.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# splitmix64's finaliser, in wrapping int64 arithmetic (two's complement multiplication is the same bits as unsigned)
_MULTIPLIER_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = -7723592293110705685  # 0x94D049BB133111EB
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15


def layer_key(seed: int, layer: str, side: str) -> int:
    """A signed 64-bit key for one side ("row", "col") of one layer."""
    digest = hashlib.blake2b(f"{seed}\0{layer}\0{side}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(key: int | Tensor, index: Tensor) -> Tensor:
    """splitmix64(key + index * golden ratio): int64, every bit usable. Broadcasts `key` against `index`."""
    z = index * _GOLDEN + key
    z = (z ^ _shift(z, 30)) * _MULTIPLIER_1
    z = (z ^ _shift(z, 27)) * _MULTIPLIER_2
    return z ^ _shift(z, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signs(h: Tensor) -> Tensor:
    """+1 / -1 from the lowest bit of a hash, float32."""
    return 1.0 - 2.0 * (h & 1).to(torch.float32)


def buckets(h: Tensor, count: int) -> Tensor:
    """0 ... count-1 from the upper bits of a hash, int64. The modulo bias is below count / 2^62."""
    return _shift(h, 2) % count


def balanced_buckets(key: int, index: Tensor, count: int) -> Tensor:
    """Buckets 0 ... count-1 of global indices: each block of `count` fills every bucket once, rotated at random.

    Two indices of one block never collide, two of different blocks with probability 1 / count: fewer collisions than
    independent buckets, and none at all with as many buckets as indices (the sketch is then exact). Unbiasedness rests
    on the signs alone. Neighbours stay neighbours, so that a projection is a sum of a few contiguous slices.
    """
    return (index + buckets(mix(key, index // count), count)) % count
