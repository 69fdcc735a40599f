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
    """Cut this context-parallel rank's tokens out of whole sequences; without context parallelism all of them.

    Of 2 x cp chunks, rank r has numbers r and -1 - r. That is how Megatron cuts, so that causal attention gives every
    rank as much to do: of 16 tokens over two ranks the first has 0-3 and 12-15, the second 4-11. Raises ConfigError for
    a length that cannot be cut so.
    """
    length, rank, size = batch.tokens.shape[1], groups.cp_rank, groups.cp_size
    if size == 1:
        return batch
    if length % (2 * size):
        raise ConfigError(
            f"scored tokens: context parallelism cuts them into 2 x {size} chunks; expected a multiple of {2 * size}, "
            f"got {length}; set selection.score_length"
        )
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return batch.map(lambda x: torch.cat([x[:, first : first + chunk], x[:, second : second + chunk]], 1))
