"""Losses of the candidates and nothing else: one forward pass without graph, capture or backward.

Under data parallelism every rank runs its own share; n float32 numbers a rank are gathered. As after a scoring pass,
parameters, modes and random states are as before, and every rank holds the same numbers to the last bit.
"""

from __future__ import annotations

import time

import torch

from megatron_opus.config import SelectionConfig
from megatron_opus.scoring.batches import checked
from megatron_opus.scoring.collectives import Traffic, all_gather, all_reduce, broadcast
from megatron_opus.scoring.undisturbed import undisturbed
from megatron_opus.scoring.windows import own_tokens
from megatron_opus.types import Batch, Groups, MicrobatchRunner, Signals


class LossPass:
    """For strategies that need {"loss"}. Collective: every rank of `groups` calls it with equally many sequences."""

    def __init__(
        self,
        runner: MicrobatchRunner,
        config: SelectionConfig,
        *,
        groups: Groups,
        device: torch.device,
    ) -> None:
        self.traffic = Traffic()
        self._runner, self._config = runner, config
        self._groups, self._device = groups, device

    def __call__(self, candidates: Batch) -> Signals:
        """Mean token losses over the scoring window of this rank's candidates [n, L]; the result covers all ranks'.

        A candidate without any token that counts in its window, or with a NaN/Inf loss, is marked in `finite`.
        """
        started, sent = time.perf_counter(), self.traffic.bytes_sent
        candidates = checked(candidates, "candidates").window(self._config.score_length)
        size = self._config.score_micro_batch_size or len(candidates)
        micros = [
            own_tokens(candidates.rows(first, min(first + size, len(candidates))), self._groups).to(self._device)
            for first in range(0, len(candidates), size)
        ]
        with undisturbed(self._runner.chunks):
            token_losses = self._runner.losses(micros)
        own = torch.zeros(len(candidates), dtype=torch.float32, device=self._device)
        for i, (micro, losses) in enumerate(zip(micros, token_losses or (), strict=token_losses is not None)):
            total = torch.where(micro.loss_mask != 0, losses * micro.loss_mask, 0.0).sum(1)
            own[i * size : (i + 1) * size] = total
        groups, traffic = self._groups, self.traffic
        # the mean runs over the whole sequence; no token that counts: NaN
        own = all_reduce(own, groups.cp, traffic) / candidates.loss_mask.sum(1).to(self._device)
        broadcast(own, groups.pp, traffic, source=groups.pp_size - 1)  # the other pipeline stages compute no loss
        over = groups.dp if self._config.scope == "global" else None
        gathered = all_gather(own, over, traffic)
        broadcast(broadcast(broadcast(gathered, over, traffic), groups.cp, traffic), groups.tp, traffic)
        loss = gathered.double().cpu()
        return Signals(
            loss=loss,
            finite=torch.isfinite(loss),
            seconds=time.perf_counter() - started,
            bytes_sent=traffic.bytes_sent - sent,
        )
