"""What DeepSpeed allocates beside weights, gradients and optimizer state."""

from __future__ import annotations


def gradient_bucket(parameters: int) -> int:
    """Elements that ZeRO reduces at a time: DeepSpeed's default buffer of 500 million is larger than a small model."""
    return min(200_000_000, max(1, parameters))
