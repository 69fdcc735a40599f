"""One scoring pass: forward and activation-gradient backward of candidates and proxy, sketches, reductions, scores.

Under data parallelism every rank scores its own share of the candidates and of the proxy (global selection):

    phi [n, F], psi [F]     this rank's partial sketches (capture.py)
    phi, psi = sum over tp                       one all-reduce of (n + 1) F numbers
    psi      = sum over dp, / K_p                one all-reduce of F + 1 numbers
    align    = gather over dp (phi psi)          n numbers a rank
    inter    = Gram of gather over dp (phi)      n F numbers a rank; only when redundancy is on

Nothing else is disturbed: parameters, .grad, optimizer state, training mode and RNG states are as before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_opus.config import ConfigError, SelectionConfig
from megatron_opus.scoring.capture import Capture, CaptureError, FeatureBuffers
from megatron_opus.scoring.collectives import Traffic, all_gather, all_reduce, broadcast
from megatron_opus.scoring.preconditioners import Preconditioners
from megatron_opus.selection import utility
from megatron_opus.selection.sketch import build_sketch
from megatron_opus.types import Batch, Groups, OptimizerState, ScoredLayer, Signals

TokenLosses = Callable[[nn.Module, Batch], Tensor]  # -> [B, T] unreduced float32 losses


class ScoringPass:
    """Scores candidates of one model. Collective: every rank of `groups` calls it with equally many sequences."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ScoredLayer],
        state: OptimizerState,
        config: SelectionConfig,
        token_losses: TokenLosses,
        *,
        groups: Groups,
        device: torch.device,
    ) -> None:
        if not layers:
            raise ConfigError(
                "no layer to score: expected tensor-parallel linear layers or nn.Linear with trainable weights in the "
                "model, found none"
            )
        self.traffic = Traffic()
        self.layers = list(layers)
        self._model, self._config, self._token_losses = model, config, token_losses
        self._groups, self._device = groups, device
        self._sketches = [
            build_sketch(
                config.sketch, name=x.name, d_out=x.d_out, d_in=x.d_in, rows=x.rows, cols=x.cols, device=device
            )
            for x in layers
        ]
        power = {"none": 0.0, "inverse_sqrt": -0.5}[config.layer_weights]
        self._layer_weights = [float(x.d_out * x.d_in) ** power for x in layers]
        self.preconditioners = Preconditioners(layers, state, config.preconditioner, groups, self.traffic, device)
        self._psi_average: Tensor | None = None
        self._psi_updates = 0

    def __call__(
        self,
        candidates: Batch,
        proxy: Batch,
        *,
        interaction: bool = True,
        proxy_padding: int = 0,
        window_seed: int = 0,
    ) -> Signals:
        """Score this rank's candidates [n, L] against this rank's share of the proxy [p, L].

        Only the first `config.score_length` tokens of each sequence are scored. Every rank passes equally many
        sequences of both kinds; the last `proxy_padding` proxy sequences fill up a share and do not count.
        The result covers the candidates of all data-parallel ranks in rank order, N = n * dp, and is identical on
        every rank; with scope `rank_local` it covers this rank's own n and is identical in its tensor-parallel group.
        `window_seed`: the same on every rank, another one at every step. A candidate with NaN/Inf scores, or without
        any token that counts in its window, is marked in
        `finite`. Raises CaptureError when a layer gives no factors, ConfigError for a proxy without counting tokens.
        """
        started = time.perf_counter()
        sent = self.traffic.bytes_sent
        candidates, proxy = (x.window(self._config.score_length) for x in (candidates, proxy))
        _check_proxy(proxy)
        self.preconditioners.refresh()
        counted = len(proxy) - proxy_padding
        buffers, losses = self._factors(candidates, proxy, counted)
        groups, traffic = self._groups, self.traffic

        packed = torch.cat([buffers.phi.flatten(), buffers.psi])
        all_reduce(packed, groups.tp, traffic)
        phi, psi = packed[: buffers.phi.numel()].view_as(buffers.phi), packed[buffers.phi.numel() :]
        summed = all_reduce(torch.cat([psi, psi.new_tensor([counted])]), groups.dp, traffic)
        psi = self._average(summed[:-1] / summed[-1])

        dp = groups.dp if self._config.scope == "global" else None
        align = all_gather(utility.alignment(phi, psi), dp, traffic)
        losses = all_gather(losses, dp, traffic)
        inter = utility.interaction(all_gather(phi, dp, traffic)) if interaction else None
        # ranks must draw from the same numbers to the last bit, whatever their kernels: the first rank's count
        for value in (align, losses, inter):
            if value is not None:
                broadcast(broadcast(value, dp, traffic), groups.tp, traffic)
        finite = torch.isfinite(align) & torch.isfinite(losses)
        if inter is not None:
            finite &= torch.isfinite(inter.diagonal())
        return Signals(
            alignment=align.cpu(),
            interaction=None if inter is None else inter.cpu(),
            loss=losses.double().cpu(),
            finite=finite.cpu(),
            seconds=time.perf_counter() - started,
            bytes_sent=traffic.bytes_sent - sent,
            geometry=self.preconditioners.geometry,
        )

    def state_dict(self) -> dict[str, Any]:
        """The proxy average, the only thing that outlives a pass. Identical on every rank."""
        average = None if self._psi_average is None else self._psi_average.cpu()
        return {"psi_average": average, "psi_updates": self._psi_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        average = state["psi_average"]
        self._psi_average = None if average is None else average.to(self._device)
        self._psi_updates = state["psi_updates"]

    def _average(self, psi: Tensor) -> Tensor:
        """Proxy momentum: hashes never change, so an average of sketches is the sketch of the average."""
        beta = self._config.proxy_momentum
        if beta == 0 or not torch.isfinite(psi).all():
            return psi  # a non-finite proxy makes this step fall back; it must not enter the average
        previous = torch.zeros_like(psi) if self._psi_average is None else self._psi_average
        self._psi_average = beta * previous + (1 - beta) * psi
        self._psi_updates += 1
        return self._psi_average / (1 - beta**self._psi_updates)

    def _factors(self, candidates: Batch, proxy: Batch, counted: int) -> tuple[FeatureBuffers, Tensor]:
        """This rank's partial sketches and mean losses [n], in micro-batches of candidates followed by proxy."""
        n = len(candidates)
        dims = [sketch.dim for sketch in self._sketches]
        buffers = FeatureBuffers(dims, n, self._config.sketch.scope, self._device)
        joined = Batch.cat([candidates, proxy])
        size = self._config.score_micro_batch_size or len(joined)
        weights = torch.ones(len(joined), device=self._device)
        weights[n + counted :] = 0.0
        losses = []
        with undisturbed(self._model):
            for first in range(0, len(joined), size):
                micro = joined.rows(first, min(first + size, len(joined))).to(self._device)
                capture = Capture(
                    self.layers,
                    self._sketches,
                    self.preconditioners,
                    buffers,
                    first=first,
                    n_candidates=max(0, min(n - first, len(micro))),
                    layer_weights=self._layer_weights,
                    groups=self._groups,
                    traffic=self.traffic,
                )
                with capture:
                    losses.append(self._run(capture, micro, weights[first : first + size]))
        return buffers, torch.cat(losses)[:n]

    def _run(self, capture: Capture, micro: Batch, weights: Tensor) -> Tensor:
        token_losses = self._token_losses(self._model, micro)
        if token_losses.shape != micro.loss_mask.shape:
            raise ConfigError(
                f"token losses: expected unreduced losses of shape {list(micro.loss_mask.shape)}, got "
                f"{list(token_losses.shape)}; the loss function must not average"
            )
        means = (token_losses * micro.loss_mask).sum(1) / micro.loss_mask.sum(1)
        if not capture.leaves:
            raise CaptureError(
                "the forward pass reached no scored layer; hooks do not fire inside compiled modules: score the "
                "uncompiled model"
            )
        # the gradient of the sum gives every sequence its own b, since sequences do not mix
        torch.autograd.grad((means * weights).sum(), capture.leaves)
        capture.check()
        return means.detach()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen weights, and on leaving: modes, requires_grad and RNG states as they were."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {p.device for p, _ in flags if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index for d in devices], enabled=True), torch.enable_grad():
        try:
            model.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


def _check_proxy(proxy: Batch) -> None:
    empty = (proxy.loss_mask.sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ConfigError(
            f"proxy sequences {empty[:8]} have no token that counts in their scoring window; raise "
            "selection.score_length or leave such sequences out of the proxy"
        )
