"""Losses of sequences, the same numbers for every layout.

The loss of a sequence is the mean over its counted tokens, the loss of a step the mean over its K sequences: how the K
are cut into micro-batches and data-parallel shares does not enter.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_losses(token_losses: Tensor, loss_mask: Tensor) -> Tensor:
    """Reduce [B, L] token losses and their mask [B, L] to [B]: sum(loss * mask) / number of counted tokens.

    A mask of 0 and 1 gives the mean. A sequence's weight is carried by its mask values: they scale the sum but not the
    number of tokens. Example: losses (2, 4), mask (0.5, 0.5) give (1 + 2) / 2 = 1.5. A sequence without any counted
    token has loss 0.
    """
    counted = (loss_mask != 0).sum(dim=1).clamp(min=1)
    # where, not *: a token that does not count may have any loss, NaN included.
    masked = torch.where(loss_mask != 0, token_losses * loss_mask, torch.zeros((), device=token_losses.device))
    return masked.sum(dim=1) / counted


def unweighted_losses(token_losses: Tensor, loss_mask: Tensor) -> Tensor:
    """Reduce [B, L] and [B, L] to [B]: the mean over the counted tokens, whatever their weight; NaN without any."""
    counted = loss_mask != 0
    return torch.where(counted, token_losses, 0.0).sum(dim=1) / counted.sum(dim=1)
