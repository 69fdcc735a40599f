"""Where the scoring windows of a step lie: the same places in every sequence and on every rank."""

from __future__ import annotations

import torch

from megatron_opus.config import ConfigError, SelectionConfig
from megatron_opus.types import Batch, Groups


def window_starts(config: SelectionConfig, length: int, seed: int) -> list[int]:
    """First tokens of `score_windows` windows of `score_length` tokens in sequences of `length` tokens.

    Windows lie at multiples of their length, so that they never overlap: the first ones, or (`random`) different ones
    drawn from `seed`. A window at least as long as the sequence is the whole sequence. Raises ConfigError when they do
    not fit.
    """
    count, wanted = config.score_windows, min(config.score_length, length)
    slots = length // wanted
    if count > slots:
        raise ConfigError(
            f"selection.score_windows: expected at most {slots} windows of {wanted} tokens in sequences of {length}, "
            f"got {count}; lower selection.score_length or selection.score_windows"
        )
    if config.score_window == "first":
        return [i * wanted for i in range(count)]
    generator = torch.Generator().manual_seed(seed)
    return sorted((torch.randperm(slots, generator=generator)[:count] * wanted).tolist())


def own_tokens(batch: Batch, groups: Groups) -> Batch:
    """Cut this context-parallel rank's tokens out of whole sequences; without context parallelism all of them."""
    return batch if groups.cp_size == 1 else batch.of_context_rank(groups.cp_rank, groups.cp_size)
