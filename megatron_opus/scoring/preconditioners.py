"""Form the preconditioners of all scored matrices from optimizer state that is sharded over ranks.

AdamW, separable   Every rank sums the second moments that it owns over rows [d_out] and columns [d_in], on global
                   coordinates, float64. One all-reduce adds the sums of all matrices up: over the data-parallel
                   ranks where they partition the state (ZeRO), and over the tensor-parallel ranks.
AdamW, exact       The whole local shard is gathered, one matrix at a time.
Muon               One data-parallel rank that holds the momentum forms the multiplier S and keeps it. Where no rank
                   holds all of it (ZeRO 3), it is gathered to one rank, one matrix at a time. The other ranks
                   receive the sketched sides S X [d, m] that they need, never S. Where Megatron orthogonalises the
                   shards of all tensor-parallel ranks together, the momentum is gathered over them, and each of these
                   ranks forms the S of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.config import ConfigError, PreconditionerConfig
from megatron_opus.errors import UnsupportedOptimizer
from megatron_opus.scoring.collectives import Traffic, all_gather, all_reduce, all_reduce_many
from megatron_opus.selection.precondition import (
    Buckets,
    Projection,
    Side,
    adam_kappa,
    compose,
    exact_multiplier,
    fragment_sums,
    muon_kappa,
    muon_multiplier,
    muon_side,
    separable_factors,
    split_multiplier,
)
from megatron_opus.selection.sketch import indices
from megatron_opus.types import AdamHyper, Fragment, Groups, Hyper, MuonHyper, OptimizerState, ScoredLayer, SgdHyper


@dataclass
class _Muon:
    """Hold Muon's multiplier of one matrix."""

    side: Side
    owner: bool  # this rank forms and keeps S
    whole: bool = False  # of the whole matrix, the same on every tensor-parallel rank; else of this rank's shard
    multiplier: Tensor | None = None  # S, on the owner


class Preconditioners:
    """Read the optimizer state that the ranks of `groups.state` hold between them, and apply P with it.

    All ranks of the tensor-parallel and the state group must call `refresh` together, and all ranks of the state group
    `compose` and `multiplier`. Experts that lie apart have a state group of their own (`Groups.state_of`).
    """

    def __init__(
        self,
        matrices: Sequence[ScoredLayer],
        state: OptimizerState,
        config: PreconditionerConfig,
        groups: Groups,
        traffic: Traffic,
        device: torch.device,
    ) -> None:
        self.geometry = ""
        self._matrices, self._state, self._config = matrices, state, config
        self._groups, self._traffic, self._device = groups, traffic, device
        self._rows = [indices(x.rows, device) for x in matrices]
        self._cols = [indices(x.cols, device) for x in matrices]
        self._hypers: list[Hyper] = []
        self._started: list[bool] = []  # of each matrix: its optimizer state exists
        self._diagonals: dict[int, dict[Side, Tensor]] = {}
        self._muon: dict[int, _Muon] = {}
        self._age = 0
        self._cached = False  # there is state, and it was read

    def refresh(self) -> bool:
        """Read the optimizer state for the coming step. Return False where the last reading is still to be used.

        With `refresh_every` 4, steps 0, 4, 8, ... read it.
        """
        if self._cached and self._age < self._config.refresh_every:
            self._age += 1
            return False
        self._age = 1
        self._hypers = self._state.hypers([x.weight for x in self._matrices], self._config.kind)
        self._started = [isinstance(h, SgdHyper) or h.step > 0 for h in self._hypers]
        self._diagonals, self._muon = {}, {}
        self._cached = any(self._started)
        if not self._cached:
            # before the first optimizer step there is no second moment: the geometry is SGD's, and the log says so
            self.geometry = "sgd (no optimizer state yet)"
            return True
        form = self._config.form
        names = {
            f"adamw-{form}" if isinstance(h, AdamHyper) else _NAMES[type(h)]
            for h, started in zip(self._hypers, self._started, strict=True)
            if started
        }
        self.geometry = " + ".join(sorted(names, reverse=True))
        if not all(self._started):
            # a weight that was never updated (unfrozen late, or without gradient so far) has the geometry of its own
            # beginning; it must not turn the others to it
            late = [x.name for x, started in zip(self._matrices, self._started, strict=True) if not started]
            self.geometry += f" + sgd ({len(late)} without optimizer state yet: {', '.join(late[:3])})"
        if form == "separable":
            self._read_second_moments()
        self._read_momenta()
        return True

    def kappa(self, index: int) -> float:
        """Return the factor of P that is the same for all elements of one matrix."""
        h = self._hypers[index]
        if not self._started[index] or isinstance(h, SgdHyper):
            return h.lr
        return adam_kappa(h) if isinstance(h, AdamHyper) else muon_kappa(h)

    def of_shard(self, index: int) -> bool:
        """Say whether this shard's own S (Muon's) preconditions the side that tensor parallelism leaves whole.

        Where S stands on the side that is cut, the other side has the sketch alone, the same on every rank.
        """
        whole: Side = "cols" if self._matrices[index].cut == "rows" else "rows"
        muon = self._muon.get(index)
        return muon is not None and not muon.whole and muon.side == whole

    def compose(self, requests: Sequence[tuple[int, Side, Projection]]) -> list[Projection]:
        """Return for each (matrix, side, sketch) the projection that applies this shard's side of P, then the sketch.

        Under Muon one all-reduce over the state group serves all requests (in pieces when large).
        """
        results: list[Projection] = []
        sent: dict[bool, list[Tensor]] = {False: [], True: []}  # of matrices that lie apart or not
        for index, side, sketch in requests:
            diagonal = self._diagonals.get(index)
            muon = self._muon.get(index)
            if diagonal is not None:
                results.append(compose(diagonal[side], sketch))
            elif muon is not None and muon.side == side:
                size = len(self._rows[index] if side == "rows" else self._cols[index])
                if muon.owner:
                    value = self._times_multiplier(index, muon, sketch)
                else:
                    value = torch.zeros(size, _width(sketch, size), device=self._device)
                sent[self._matrices[index].apart].append(value)
                results.append(value)
            else:
                results.append(sketch)
        all_reduce_many(sent[False], self._groups.state, self._traffic)
        all_reduce_many(sent[True], self._groups.expert_state, self._traffic)
        return results

    def _times_multiplier(self, index: int, muon: _Muon, sketch: Projection) -> Tensor:
        """Multiply S with a sketch of its side: [local indices, m]. Collective over the ranks that share a whole S."""
        s = muon.multiplier
        assert s is not None
        if muon.whole and muon.side == self._matrices[index].cut:
            # this rank sketches its own indices alone: S X is a sum over the ranks, of which it needs its own rows
            if sketch is None:
                raise ConfigError(
                    f"{self._matrices[index].name}: Muon's multiplier joins rows of all tensor-parallel ranks, which "
                    "operator materialise cannot apply; expected selection.sketch.operator two_sided or two_stage"
                )
            own = self._rows[index] if muon.side == "rows" else self._cols[index]
            value = compose(s[:, own], sketch)
            assert isinstance(value, Tensor)
            return _take(all_reduce(value, self._groups.tp, self._traffic), own)
        value = compose(s, sketch)
        assert isinstance(value, Tensor)
        return value.clone() if value is s else value

    def multiplier(self, index: int) -> Tensor | None:
        """Return D of one AdamW matrix on this rank's shard, [O, I] float32; None unless the form is `exact`."""
        hyper = self._hypers[index]
        if not self._started[index] or self._config.form != "exact" or not isinstance(hyper, AdamHyper):
            return None
        shard = self._assemble(index, _of_part(self._matrices[index], self._state.second_moment))
        if self._state.sharded_over_dp:
            all_reduce(shard, self._groups.state_of(self._matrices[index])[0], self._traffic)
        # what is no second moment marks every candidate as not finite: an infinite one would only take the weight out
        return exact_multiplier(torch.where(torch.isfinite(shard), shard, torch.nan), hyper)

    def invalidate(self) -> None:
        """Make the next `refresh` read anew. Called when a checkpoint is written: a resumed run has no cache either."""
        self._cached = False

    def _assemble(self, index: int, fragments: Sequence) -> Tensor:
        """Return [O, I] float32 with the fragments in their places and zeros elsewhere."""
        rows, cols = len(self._rows[index]), len(self._cols[index])
        flat = torch.zeros(rows * cols, dtype=torch.float32, device=self._device)
        for fragment in fragments:
            flat[fragment.start : fragment.start + fragment.values.numel()] = fragment.values.float()
        return flat.view(rows, cols)

    def _read_second_moments(self) -> None:
        adam = [(i, x, h) for i, (x, h) in enumerate(zip(self._matrices, self._hypers, strict=True))
                if isinstance(h, AdamHyper) and self._started[i]]  # fmt: skip
        if not adam:
            return
        for apart in (False, True):
            self._read_together([found for found in adam if found[1].apart == apart], apart)

    def _read_together(self, adam: Sequence[tuple[int, ScoredLayer, AdamHyper]], apart: bool) -> None:
        """Read the second moments of matrices whose state is spread over the same ranks."""
        if not adam:
            return
        sizes = [x.d_out + x.d_in for _, x, _ in adam]
        sums = torch.zeros(sum(sizes), dtype=torch.float64, device=self._device)
        views = sums.split(sizes)
        for (i, x, _), view in zip(adam, views, strict=True):
            if x.replicated and self._groups.tp_rank != 0:
                continue  # every tensor-parallel rank holds the same state: counted once
            rows, cols = self._rows[i], self._cols[i]
            for fragment in _of_part(x, self._state.second_moment):
                row_sum, col_sum = fragment_sums(fragment, len(rows), len(cols))
                # a negative one may vanish in a sum; NaN does not, on no rank
                row_sum = torch.where((fragment.values >= 0).all(), row_sum, torch.nan)
                view[: x.d_out].index_add_(0, rows, row_sum.to(self._device))
                view[x.d_out :].index_add_(0, cols, col_sum.to(self._device))
        if self._state.sharded_over_dp:
            all_reduce(sums, self._groups.state_of(adam[0][1])[0], self._traffic)
        if not apart:  # each of them lies whole on its ranks
            all_reduce(sums, self._groups.tp, self._traffic)
        if not torch.isfinite(sums).all():
            bad = [x.name for (_, x, _), view in zip(adam, views, strict=True) if not torch.isfinite(view).all()]
            raise UnsupportedOptimizer(
                f"optimizer state of {bad[0]} (of {len(bad)} matrices): expected second moments that are finite and "
                "not negative, found others; the coming update of this weight is not a number either"
            )
        for (i, x, hyper), view in zip(adam, views, strict=True):
            r, c = separable_factors(view[: x.d_out], view[x.d_out :], hyper)
            self._diagonals[i] = {"rows": _take(r, self._rows[i]), "cols": _take(c, self._cols[i])}

    def _read_momenta(self) -> None:
        chosen = [i for i, h in enumerate(self._hypers) if isinstance(h, MuonHyper) and self._started[i]]
        for apart in (False, True):
            self._read_momenta_of([i for i in chosen if self._matrices[i].apart == apart])

    def _read_momenta_of(self, chosen: Sequence[int]) -> None:
        """Read the momenta of matrices whose state is spread over the same ranks."""
        if not chosen:
            return
        group, group_rank = self._groups.state_of(self._matrices[chosen[0]])
        fragments = [_of_part(self._matrices[i], self._state.momentum) for i in chosen]
        held = torch.tensor([sum(f.values.numel() for f in found) for found in fragments], device=self._device)
        everywhere = all_gather(held[None], group, self._traffic).tolist()  # [dp][matrices]
        load = [0] * len(everywhere)
        for place, (i, found) in enumerate(zip(chosen, fragments, strict=True)):
            rows, cols = len(self._rows[i]), len(self._cols[i])
            hyper = self._hypers[i]
            assert isinstance(hyper, MuonHyper)
            holders = [rank for rank, sizes in enumerate(everywhere) if sizes[place] == rows * cols]
            owner = min(holders or range(len(load)), key=lambda rank: load[rank])
            load[owner] += min(rows, cols) ** 2 * max(rows, cols)
            x = self._matrices[i]
            whole = hyper.whole and not x.replicated
            side: Side = "rows" if hyper.split else muon_side(x.d_out, x.d_in) if whole else muon_side(rows, cols)
            muon = _Muon(side=side, owner=owner == group_rank, whole=whole)
            momentum = self._assemble(i, found) if muon.owner or not holders else None
            if not holders:
                if sum(sizes[place] for sizes in everywhere) != rows * cols:
                    raise ConfigError(
                        f"{self._matrices[i].name}: expected the data-parallel ranks to hold Muon's momentum of "
                        f"{rows * cols} numbers between them, found {[sizes[place] for sizes in everywhere]}"
                    )
                assert momentum is not None
                assert group is not None
                dist.reduce(momentum, dist.get_global_rank(group, owner), group=group)
                self._traffic.count(momentum)
            if muon.owner:
                assert momentum is not None
                momentum = self._joined(i, momentum) if whole else momentum
                steps = self._steps(hyper)
                if hyper.split:
                    muon.multiplier = split_multiplier(momentum, steps, hyper.split)
                else:
                    muon.multiplier = muon_multiplier(momentum, steps)
            self._muon[i] = muon

    def _joined(self, index: int, shard: Tensor) -> Tensor:
        """Put the shards [O, I] of all tensor-parallel ranks together to the whole matrix."""
        x = self._matrices[index]
        found = torch.zeros(x.d_out, x.d_in, dtype=shard.dtype, device=self._device)
        found[self._rows[index][:, None], self._cols[index]] = shard
        return all_reduce(found, self._groups.tp, self._traffic)

    def _steps(self, hyper: MuonHyper) -> tuple[tuple[float, float, float], ...]:
        wanted = self._config.muon_steps
        if wanted is None:
            return hyper.coefficients
        if wanted > len(hyper.coefficients):
            raise ConfigError(
                f"selection.preconditioner.muon_steps: expected at most the {len(hyper.coefficients)} steps of the "
                f"optimizer, got {wanted}"
            )
        return hyper.coefficients[:wanted]


_NAMES = {MuonHyper: "muon", SgdHyper: "sgd"}


def _of_part(layer: ScoredLayer, read: Callable[[torch.nn.Parameter], Sequence[Fragment]]) -> Sequence[Fragment]:
    """Read the fragments of a layer's matrix, which may be a part of its weight."""
    fragments = read(layer.weight)
    if layer.part is None:
        return fragments
    size = layer.d_out * layer.d_in
    found = (fragment.within(layer.part * size, size) for fragment in fragments)
    return [fragment for fragment in found if fragment is not None]


def _width(sketch: Projection, size: int) -> int:
    if sketch is None:
        return size
    return sketch.count if isinstance(sketch, Buckets) else sketch.shape[1]


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values[index].contiguous()
