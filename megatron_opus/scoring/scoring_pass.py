"""One scoring pass: forward and activation-gradient backward of candidates and proxy, sketches, reductions, scores.

Under data parallelism every rank scores its own share of the candidates and of the proxy (global selection):

    proxy       psi [F], this rank's partial features (capture.py): all-reduce over tp and dp
                or, when the alignment is one_sided or direct, the gradients themselves: all-reduce over dp
    candidates  phi [n, F]: one all-reduce over tp
    align [n]   from phi and psi, or one all-reduce over tp; gathered over dp
                [n, 2] with that of half of the proxy, where selection.controller asks for it
    context     the tokens of a sequence lie on several ranks: all sums over tp run over cp as well, those over dp of
                gradients too; the mean loss is divided by the tokens of the whole sequence
    experts     tokens of n sequences on each of `shares` data-parallel ranks meet on the ranks that hold the experts:
                phi [shares * n, F] and align, one all-reduce over these ranks, of which each keeps its own n rows;
                gradients of experts are added up over the ranks that hold the same experts
    stages      what lies on other pipeline stages is added up: stages.py
    inter       Gram of gather over dp (phi), n F numbers a rank; only when redundancy is on

The proxy is read before the candidates, in micro-batches of its own.

Nothing else is disturbed: parameters, .grad, optimizer state, training mode and RNG states are as before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_opus.config import SelectionConfig
from megatron_opus.layout.coverage import Coverage
from megatron_opus.scoring.batches import Vocabulary, check_proxy, checked
from megatron_opus.scoring.capture import Capture, CaptureError
from megatron_opus.scoring.collectives import Traffic, all_gather, all_reduce, all_reduce_many, broadcast
from megatron_opus.scoring.fp8 import Fp8
from megatron_opus.scoring.microbatch import CapturedMicrobatch
from megatron_opus.scoring.preconditioners import Preconditioners
from megatron_opus.scoring.projections import Part, Plan
from megatron_opus.scoring.proxy_average import ProxyAverage
from megatron_opus.scoring.stages import StageSums
from megatron_opus.scoring.sums import Reading, Sums
from megatron_opus.scoring.undisturbed import undisturbed
from megatron_opus.scoring.verify import Verifier, WeightGradients
from megatron_opus.scoring.windows import own_tokens, window_starts
from megatron_opus.selection import utility
from megatron_opus.types import (
    Batch,
    Groups,
    MicrobatchRunner,
    OptimizerState,
    ScoredLayer,
    Signals,
)


class ScoringPass:
    """Scores candidates of one model. Collective: every rank of `groups` calls it with equally many sequences."""

    def __init__(
        self,
        runner: MicrobatchRunner,
        layers: Sequence[ScoredLayer],
        state: OptimizerState,
        config: SelectionConfig,
        *,
        groups: Groups,
        device: torch.device,
        verify: WeightGradients | None = None,
        coverage: Coverage | None = None,
        vocabulary: Vocabulary = (None, None),
    ) -> None:
        """`runner` runs the model forward and backward; the pass itself does not know how the model is cut.

        `verify` lets the first call compare what the hooks see of one candidate with autograd's own gradients (see
        verify.py); None leaves that out. `coverage` is repeated in every result. `vocabulary` bounds the ids.
        """
        self.traffic, self.layers = Traffic(), list(layers)
        self._runner, self._config = runner, config
        self._groups, self._device = groups, device
        self._fp8 = Fp8(runner.chunks) if config.score_precision == "fp8" else None
        # a matrix is a parameter, or a part of one: modules that share it are uses of it
        slots: dict[tuple[int, int | None], int] = {}
        self._matrix_of = [slots.setdefault((id(x.weight), x.part), len(slots)) for x in layers]
        matrices = [layers[self._matrix_of.index(i)] for i in range(len(slots))]
        self._plan = Plan(matrices, config.sketch, device, target=config.target)
        self.preconditioners = Preconditioners(matrices, state, config.preconditioner, groups, self.traffic, device)
        self._dims = [operator.dim for operator in self._plan.operators]
        numbers: dict[str, int] = {}  # slots: a matrix, or all experts of a layer
        self._slots = [numbers.setdefault(x.slot or x.name, len(numbers)) for x in matrices]
        shapes = [self._plan.gradient_shape(i) for i in range(len(matrices))]
        self._stages = StageSums(
            [x.name for x in matrices], self._dims, shapes, config.sketch.scope, groups, self.traffic, device
        )
        # of the last proxy batch, averaged over it: psi alone, or the gradient of each matrix
        self._proxy: list[Tensor] | None = None
        self._halves = config.controller.enabled  # whether candidates are measured against half of the proxy, too
        self._half: list[Tensor] | None = None
        self._half_share = 0.0  # of the proxy sequences
        self._proxy_age = 0
        self._parts: tuple[bool, list[list[Part]]] | None = None
        self._average = ProxyAverage(config.proxy_momentum, groups, self._stages, self.traffic, device)
        self._coverage, self._vocabulary = coverage, vocabulary
        self._verifier = None if verify is None else Verifier(verify, matrices, groups, device)

    @property
    def verified(self) -> str:
        """What the comparison with autograd's gradients found; empty before it was made, or without one."""
        return "" if self._verifier is None else self._verifier.result

    @property
    def proxy_due(self) -> bool:
        """Whether the next pass reads its proxy batch; it is ignored otherwise (`proxy_refresh_every`)."""
        return self._proxy is None or self._proxy_age >= self._config.proxy_refresh_every

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

        `config.score_windows` windows of `config.score_length` tokens of each sequence are scored; `window_seed`, the
        same on every rank, places them when they are random. Every rank passes equally many sequences of both kinds;
        the last `proxy_padding` proxy sequences fill up a share and do not count.
        With scope `global` the result covers the candidates of all data-parallel ranks in rank order, N = n * dp, and
        is identical on every rank; with `rank_local` it covers this rank's n. A candidate with NaN/Inf scores, or
        without any token that counts in its windows, is marked in `finite`. Labels of -100 do not count. Raises
        CaptureError when a layer gives no factors, ConfigError for a proxy without counting tokens, and, from the first
        call where it was built with `verify`, VerificationError when the hooks do not see the gradients of autograd.
        """
        candidates = checked(candidates, "candidates", self._vocabulary)
        proxy = checked(proxy, "proxy", self._vocabulary)
        started, traffic, groups = time.perf_counter(), self.traffic, self._groups
        sent = traffic.bytes_sent
        windows, proxies = (self._windows(x, window_seed) for x in (candidates, proxy))
        refreshed = self.preconditioners.refresh()
        due, direct = self.proxy_due, self._plan.direct
        if due:
            self._parts = None
            self._read_proxy(proxies, len(proxy) - proxy_padding)
        self._proxy_age += 1
        features = interaction or not direct
        if refreshed or self._parts is None or self._parts[0] != features:
            known = (self._proxy, self._half) if direct else (None, None)
            self._parts = (features, self._plan.candidates(self.preconditioners, known[0], features, known[1]))
        probing = self._verifier is not None and not self._verifier.result
        chosen = self._verifier.choose(windows[0]) if self._verifier is not None and probing else None
        probed = chosen if self._fp8 is None else None
        losses, sums = self._read(windows, self._parts[1], features, candidate=True, chosen=probed)
        if self._verifier is not None and probing:
            self._compare(self._verifier, windows, sums, chosen)
        phi = self._stages.features(self._of_all_tokens(sums, sums.phi, len(candidates)), sums.all_columns())
        if direct:
            align = self._stages.total(self._of_all_tokens(sums, sums.align, len(candidates)))
        else:
            assert self._proxy is not None
            psis = [*self._proxy, *(self._half or [])]
            align = self._stages.from_features(torch.stack([utility.alignment(phi, psi) for psi in psis], 1))
        losses = self._stages.of_last(all_reduce(losses, groups.cp, traffic))
        over = groups.dp if self._config.scope == "global" else None
        align, losses = (all_gather(x, over, traffic) for x in (align, losses))
        inter = None
        if interaction:
            inter = self._stages.from_features(utility.interaction(all_gather(phi, over, traffic)))
        # ranks must draw from the same numbers to the last bit, whatever their kernels: the first rank's count
        for value in (align, losses, inter):
            if value is not None:
                broadcast(broadcast(broadcast(value, over, traffic), groups.cp, traffic), groups.tp, traffic)
        halves = None
        if self._halves:
            rest = (align[:, 0] - self._half_share * align[:, 1]) / (1 - self._half_share)
            halves = torch.stack([align[:, 1], rest], 1).cpu()
        align = align[:, 0].contiguous()
        load = self._expert_load(sums, len(candidates), together=over is not None)
        finite = torch.isfinite(align) & torch.isfinite(losses)
        if inter is not None:
            finite &= torch.isfinite(inter.diagonal())
        return Signals(
            alignment=align.cpu(),
            halves=halves,
            interaction=None if inter is None else inter.cpu(),
            loss=losses.double().cpu(),
            finite=finite.cpu(),
            expert_load=load,
            seconds=time.perf_counter() - started,
            bytes_sent=traffic.bytes_sent - sent,
            geometry=self._stages.spoken(self.preconditioners.geometry),
            proxy_read=due,
            coverage=None if self._coverage is None else self._coverage.share,
            left_out=() if self._coverage is None else self._coverage.left_out,
        )

    def invalidate(self) -> None:
        """Forget what may be older than this step. Called when a checkpoint is written: a resumed run has no cache."""
        self.preconditioners.invalidate()
        self._proxy, self._half, self._parts = None, None, None

    def state_dict(self) -> dict[str, Any]:
        """The proxy average of every pipeline stage, the only thing that outlives `invalidate`. Collective."""
        return self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave under the same tensor and pipeline parallelism."""
        self._average.load_state_dict(state)

    def _read_proxy(self, proxies: Sequence[Batch], counted: int) -> None:
        """Read psi, or the proxy's (half sketched) gradient of each matrix: the mean over all ranks' proxy sequences.

        Where half of the proxy is wanted on its own, the halves are read one after the other.
        """
        check_proxy(proxies)
        self._proxy_age = 0
        shares, n = [(proxies, counted)], len(proxies[0])
        if self._halves and n > 1:
            cut = (n + 1) // 2
            shares = [
                ([x.rows(0, cut) for x in proxies], min(cut, counted)),
                ([x.rows(cut, n) for x in proxies], max(0, counted - cut)),
            ]
        elif self._halves:  # one sequence on each rank: every second rank's is the first half
            first = self._groups.dp_rank % 2 == 0
            shares = [(proxies, counted if first else 0), (proxies, 0 if first else counted)]
        sums, counts = zip(*(self._proxy_sum(part, number) for part, number in shares), strict=True)
        total = sum(counts[1:], counts[0])
        self._proxy = self._average([sum(x[1:], x[0]) / total for x in zip(*sums, strict=True)])
        if self._halves:
            self._half, self._half_share = [x / counts[0] for x in sums[0]], float(counts[0] / total)

    def _proxy_sum(self, proxies: Sequence[Batch], counted: int) -> tuple[list[Tensor], Tensor]:
        """Return the sums over the first `counted` of all ranks' proxy sequences, and how many these are."""
        groups, traffic, plan = self._groups, self.traffic, self._plan
        _, sums = self._read(proxies, plan.proxy(), not plan.direct, candidate=False, counted=counted)
        total = all_reduce(torch.tensor([float(counted)], device=self._device), groups.dp, traffic)
        if not plan.direct:
            # a sum over all tokens, wherever they were read
            psi = all_reduce(all_reduce(sums.psi, groups.tp, traffic), groups.cp, traffic)
            psi = all_reduce(psi, groups.dp, traffic)
            return [self._stages.features(psi, sums.all_columns())], total
        # None: a matrix that another tensor-parallel rank counts
        gradients = [
            torch.zeros(plan.gradient_shape(i), dtype=torch.float32, device=self._device) if found is None else found
            for i, found in enumerate(sums.gradients)
        ]
        matrices = self._plan.matrices
        for group, apart in ((groups.state, False), (groups.expert_state, True)):
            all_reduce_many([g for g, x in zip(gradients, matrices, strict=True) if x.apart == apart], group, traffic)
        own_tokens = [g for g, x in zip(gradients, matrices, strict=True) if x.own_tokens]
        all_reduce_many(own_tokens, groups.tp, traffic)
        self._stages.gradients(gradients)
        return gradients, total

    def _read(
        self,
        windows: Sequence[Batch],
        parts: Sequence[Sequence[Part]],
        features: bool,
        *,
        candidate: bool,
        counted: int | None = None,
        chosen: int | None = None,
    ) -> tuple[Tensor, Sums]:
        """Read this rank's sequences in micro-batches: their mean losses [B] (on the last stage), and the sums.

        The mean of a sequence runs over the counted tokens of all its windows, of which each window gives its part.
        Sequences from `counted` on are read with weight 0, as are those that fill the micro-batches up. In the first
        window, the gradient of sequence `chosen` is read for the verifier too.
        """
        total = len(windows[0])
        size = min(self._config.score_micro_batch_size or total, total)
        filled = self._runner.padded(total, size, len(windows))
        windows = [Batch.cat([x, *[x.rows(0, 1)] * (filled - total)]) for x in windows] if filled > total else windows
        sums = self._sums(filled if candidate else 0, features)
        tokens = self._counted_tokens(windows)
        weights = torch.ones(filled, device=self._device)
        weights[total if counted is None else counted :] = 0.0
        losses = torch.zeros(filled, dtype=torch.float32, device=self._device)
        micros = []
        for number, window in enumerate(windows):
            for first in range(0, filled, size):
                rows = slice(first, min(first + size, filled))
                probed = number == 0 and chosen is not None and rows.start <= chosen < rows.stop
                reading = Reading(
                    parts=self._with_probes(parts) if probed else parts,
                    candidate=candidate,
                    shape=(rows.stop - rows.start, window.tokens.shape[1] // self._groups.cp_size),
                    first=first,
                    probed=(chosen or 0) - first,
                    share=self._groups.share,
                )
                batch = own_tokens(window.rows(rows.start, rows.stop), self._groups)
                micros.append(self._micro(batch, reading, sums, tokens[rows], weights[rows], losses[rows]))
        self._run(micros)
        return losses[:total], sums

    def _sums(self, n: int, features: bool) -> Sums:
        return Sums(
            self._dims,
            self._slots,
            n,
            self._config.sketch.scope,
            self._device,
            features=features,
            width=self._stages.width,
            shares=self._groups.shares,
            alignments=1 + self._halves,
        )

    def _expert_load(self, sums: Sums, count: int, *, together: bool) -> Tensor | None:
        """Return the load [N, layers, experts] of all ranks' candidates on the CPU. Collective where there are experts.

        Each tensor-parallel rank has counted its own tokens, and each stage its own layers.
        """
        if not sums.load:
            return None
        load = torch.stack([sums.load[i][:count] for i in sorted(sums.load)], 1)
        load = all_reduce(load, self._groups.tp, self.traffic)
        load = all_gather(load, self._groups.dp if together else None, self.traffic).cpu()
        return torch.cat(self._stages.gathered(load), 1)

    def _of_all_tokens(self, sums: Sums, value: Tensor, count: int) -> Tensor:
        """Add up phi or align over the ranks that read tokens of this rank's sequences, of which it keeps its own."""
        return sums.of_share(all_reduce(value, self._groups.tokens, self.traffic), self._groups.share, count)

    def _micro(
        self, batch: Batch, reading: Reading, sums: Sums, tokens: Tensor, weights: Tensor, losses: Tensor
    ) -> CapturedMicrobatch:
        capture = Capture(
            self.layers,
            self._matrix_of,
            reading,
            self.preconditioners,
            sums,
            self._groups,
            self.traffic,
        )
        return CapturedMicrobatch(batch, capture, tokens, weights, losses, self._config, self._device, self._fp8)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with undisturbed(self._runner.chunks), contextlib.nullcontext() if self._fp8 is None else self._fp8.forgotten():
            yield

    def _run(self, micros: Sequence[CapturedMicrobatch]) -> None:
        with self._undisturbed():
            self._runner.backward(micros)
        for micro in micros:
            micro.capture.check()

    def _with_probes(self, parts: Sequence[Sequence[Part]]) -> list[list[Part]]:
        assert self._verifier is not None
        return [[*found, probe] for found, probe in zip(parts, self._verifier.parts(), strict=True)]

    def _windows(self, batch: Batch, seed: int) -> list[Batch]:
        """The scoring windows of every sequence; candidates and proxy may have lengths of their own."""
        length = batch.tokens.shape[1]
        starts = window_starts(self._config, length, seed)
        return [batch.window(min(self._config.score_length, length), start) for start in starts]

    def _counted_tokens(self, windows: Sequence[Batch]) -> Tensor:
        return torch.stack([x.loss_mask.sum(1) for x in windows]).sum(0).to(self._device)

    def _compare(self, verifier: Verifier, windows: Sequence[Batch], sums: Sums, chosen: int | None) -> None:
        """Verify what `sums` saw. A pass in fp8, whose rounding would hide a fault, is read once more without it."""
        if self._fp8 is None:
            return self._verify(verifier, windows, sums, chosen)
        fp8, self._fp8 = self._fp8, None
        try:
            _, seen = self._read(windows, [[] for _ in self._dims], False, candidate=True, chosen=chosen)
            return self._verify(verifier, windows, seen, chosen)
        finally:
            self._fp8 = fp8

    def _verify(self, verifier: Verifier, windows: Sequence[Batch], sums: Sums, chosen: int | None) -> None:
        """Compare sequence `chosen` with autograd; where they differ, read it once more alone, to say why."""
        row = slice(chosen or 0, (chosen or 0) + 1)
        batch = own_tokens(windows[0].rows(row.start, row.stop), self._groups)
        tokens = self._counted_tokens(windows)[row]

        def alone(parts: Sequence[Sequence[Part]], into: Sums) -> CapturedMicrobatch:
            reading = Reading(parts=parts, candidate=True, shape=(1, batch.tokens.shape[1]), share=self._groups.share)
            one = torch.ones(1, device=self._device)
            return self._micro(batch, reading, into, tokens, one, torch.zeros_like(one))

        with self._undisturbed():
            differ = verifier.compare(alone([[] for _ in sums.dims], sums), sums, known=chosen is not None)
        if differ:
            again = self._sums(1, features=False)
            size = min(self._config.score_micro_batch_size or len(windows[0]), len(windows[0]))
            try:
                self._run([alone([[part] for part in verifier.parts()], again)])
            except CaptureError as error:
                raise verifier.difference(f"read alone, {error}") from error
            raise verifier.explained(again, micro_batch=size)
