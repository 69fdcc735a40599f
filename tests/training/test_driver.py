"""The driver's own decisions: fallbacks are counted and end a run, ranks that disagree are found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_opus.config import RunConfig, SelectionConfig, from_dict
from megatron_opus.selection.strategies import OpusStrategy
from megatron_opus.training.driver import SelectionDriver, TooManyFallbacks
from megatron_opus.types import Batch, Candidates, Groups, Signals

N, K = 8, 4


class Ids:
    """Buffer, corpus and iterator of a driver that is only asked for ids."""

    domains = {"candidates": ("only",)}  # noqa: RUF012
    notices: list[str] = []  # noqa: RUF012

    def draw(self, step, weights):
        return Candidates(step=step, sample_ids=np.arange(N) + N * step, domains=np.zeros(N, dtype=np.int32))

    def settle(self, candidates, chosen):
        self.settled = chosen

    def fill_selection(self, corpus, ids, micro_batch_size, weights):
        self.filled = ids

    def proxy_ids(self, step, count, seed):
        return np.arange(count)

    def batch(self, ids):
        tokens = torch.zeros(len(ids), 4, dtype=torch.int64)
        return Batch(tokens=tokens, labels=tokens, loss_mask=torch.ones(len(ids), 4), position_ids=tokens)


def recipe(**selection) -> RunConfig:
    return from_dict(
        {
            "name": "test",
            "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1},
            "data": {"seq_length": 4},
            "training": {"global_batch_size": K, "micro_batch_size": 1},
            "selection": selection,
        }
    )


def driver(config: RunConfig, align: torch.Tensor, groups: Groups | None = None) -> tuple[SelectionDriver, Ids]:
    ids = Ids()
    padding = []

    def scorer(candidates, proxy, *, interaction, proxy_padding, window_seed):
        padding.append((len(candidates), len(proxy), proxy_padding))
        ids.window_seeds.append(window_seed)
        return Signals(alignment=align, interaction=torch.outer(align, align), geometry="adamw-separable")

    ids.scored, ids.window_seeds = padding, []
    made = SelectionDriver(config, groups or Groups(), ids, ids, OpusStrategy(config.selection), scorer, ids)
    return made, ids


def test_fallbacks_are_counted_said_and_bounded():
    """Fault: a run that selects at random for weeks because every score is NaN."""
    d, ids = driver(recipe(max_fallbacks=2), torch.full((N,), math.nan, dtype=torch.float64))
    for step in range(2):
        d.choose()
        d.counters.step += 1
        assert len(ids.filled) == K
        assert d.counters.fallbacks == step + 1
    assert sum("fell back to random" in notice for notice in d.notices) == 2
    with pytest.raises(TooManyFallbacks, match=r"max_fallbacks allows 2.*0 of 8"):
        d.choose()


def test_an_almost_uniform_draw_is_said_once_and_the_geometry_at_every_change():
    """Fault: a temperature in the wrong unit makes selection random, and nobody is told."""
    config = recipe(temperature_unit="absolute", redundancy={"scale": "off"})
    d, _ = driver(config, 1e-9 * torch.arange(N, dtype=torch.float64))
    for _ in range(3):
        d.choose()
        d.counters.step += 1
    assert sum("almost uniform" in notice for notice in d.notices) == 1
    assert sum("adamw-separable" in notice for notice in d.notices) == 1


def test_training_order_is_buffer_order():
    """Fault: draw order in the batch changes the order of summation, so that rho = 1 differs from no selection."""
    d, ids = driver(recipe(), torch.randn(N, generator=torch.Generator().manual_seed(0)).double())
    _, _, selection = d.choose()
    assert ids.filled.tolist() == sorted(selection.indices.tolist())
    assert ids.settled.tolist() == ids.filled.tolist()


@pytest.mark.parametrize(("ranks", "expected"), [(2, [(4, 3, 0), (4, 3, 1)]), (8, [(1, 1, 0)] * 5 + [(1, 1, 1)] * 3)])
def test_a_proxy_smaller_than_the_ranks_is_filled_up(ranks, expected):
    """Fault: 8 proxy sequences refuse 16 data-parallel ranks, or a rank without one makes fewer collective calls."""
    config = recipe(proxy_batch_size=5)
    seen = []
    for rank in range(ranks):
        d, ids = driver(config, torch.arange(N).double(), Groups(dp_rank=rank, dp_size=ranks))
        d.choose()
        seen += ids.scored
    assert seen == expected


def test_scoring_windows_are_those_of_the_step_on_every_rank_and_after_a_resume():
    """Fault: ranks look at windows at different places, or a resumed run looks elsewhere than the run it continues."""
    seeds = []
    for rank in range(2):
        d, ids = driver(recipe(), torch.arange(N).double(), Groups(dp_rank=rank, dp_size=2))
        for step in (0, 1, 2) if rank == 0 else (1, 2):
            d.counters.step = step
            d.choose()
        seeds.append(ids.window_seeds)
    assert seeds[0][1:] == seeds[1]
    assert len(set(seeds[0])) == 3
    assert all(0 <= seed < 2**63 for seed in seeds[0])


def differing_draws() -> str:
    import torch.distributed as dist

    config = recipe(debug_checks=True)
    d, _ = driver(config, torch.arange(N).double())
    d.generator.manual_seed(dist.get_rank())
    try:
        for _ in range(20):
            d.choose()
            d.counters.step += 1
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_that_drew_differently_are_named(world2):
    """Fault: ranks train on different selections and nothing notices."""
    assert all("ranks [1] drew other candidates" in said for said in world2.run(differing_draws))
    assert SelectionConfig().debug_checks is False
