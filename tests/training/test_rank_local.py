"""Rank-local selection: own candidates, own draws, one record, the same again after a resume."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import recipe, run

from megatron_opus.config import ConfigError, from_dict, to_dict, validate_world
from megatron_opus.training import rank_local
from megatron_opus.types import Groups, Selection, Signals

STEPS, N, K = 8, 8, 4
LOCAL = {"scope": "rank_local", "proxy_momentum": 0.5, "sketch": {"alignment": "features"}}
TRAINING = {"train_steps": STEPS, "checkpoint_interval": 4}
OPTIMIZER = {"lr_decay_steps": STEPS}


def of_step(result, column, step):
    return result[column][step * N : (step + 1) * N]


@pytest.fixture(scope="module")
def two_ranks(embedded_cache, tmp_path_factory, world2):
    """Two data-parallel ranks, undisturbed: the results of both."""
    config = recipe(
        embedded_cache,
        tmp_path_factory.mktemp("runs"),
        "whole",
        selection=LOCAL,
        training=TRAINING,
        optimizer=OPTIMIZER,
        data={"unselected": "return"},
        parallel={"zero_stage": 1},
    )
    return world2.run(run, config)


def test_every_rank_selects_its_share_of_its_own(two_ranks, embedded_cache, tmp_path, world2):
    """Fault: a rank draws from the candidates of another, or only rank 0's decisions reach the ledger; scores against
    the rank's own proxy share instead of the whole proxy. At step 0 the alignments are those of global selection."""
    first = two_ranks[0]
    assert first["selected"] == two_ranks[1]["selected"]
    halves = set()
    for step in range(STEPS):
        selected, order = (of_step(first, column, step) for column in ("selected", "order"))
        assert [sum(selected[: N // 2]), sum(selected[N // 2 :])] == [K // 2, K // 2]
        # draws 0 and 2 are rank 0's, 1 and 3 rank 1's
        assert [position // (N // 2) for position in sorted(range(N), key=lambda p: order[p])[-K:]] == [0, 1, 0, 1]
        halves.add(tuple(selected[: N // 2]) == tuple(selected[N // 2 :]))
    assert False in halves  # the two generators are not the same one
    config = recipe(
        embedded_cache,
        tmp_path,
        "global",
        training={"train_steps": 1},
        optimizer=OPTIMIZER,
        selection={"sketch": LOCAL["sketch"]},
        data={"unselected": "return"},
    )
    everyone = world2.run(run, config)[0]
    assert of_step(first, "ids", 0) == everyone["ids"]
    torch.testing.assert_close(first["alignment"][:N], everyone["alignment"], rtol=1e-4, atol=0)


def test_tensor_parallel_ranks_draw_alike(two_ranks, embedded_cache, tmp_path, world4):
    """Fault: a generator per process instead of per data-parallel rank: tensor-parallel ranks train on different
    sequences. The decisions are those of the run without tensor parallelism."""
    config = recipe(
        embedded_cache,
        tmp_path,
        "tp2",
        selection=LOCAL,
        training=TRAINING,
        optimizer=OPTIMIZER,
        data={"unselected": "return"},
        parallel={"tensor_model_parallel_size": 2, "zero_stage": 1},
    )
    results = world4.run(run, config)
    for result in results:
        assert result["ids"] == two_ranks[0]["ids"]
        assert result["order"] == two_ranks[0]["order"]


def test_a_resumed_run_draws_the_same(two_ranks, embedded_cache, tmp_path, world2, world4):
    """Fault: only rank 0's generator in the checkpoint, so that the others begin their draws anew; a resume with
    another number of data-parallel ranks that goes on with generators which do not exist."""

    def config(**training):
        return recipe(
            embedded_cache,
            tmp_path,
            "cut",
            selection=LOCAL,
            training={**TRAINING, **training},
            optimizer=OPTIMIZER,
            data={"unselected": "return"},
            parallel={"zero_stage": 1},
        )

    world2.run(run, config(train_steps=4))
    said = world4.run(fails, config(), True)
    assert all("CheckpointError" in text and "data_parallel_size" in text for text in said), said
    resumed = world2.run(run, config(), True)[0]
    for column in ("losses", "ids", "order"):
        assert resumed[column] == two_ranks[0][column], column
    assert torch.equal(resumed["weights"], two_ranks[0]["weights"])
    assert resumed["driver"] == two_ranks[0]["driver"]


def fails(config, resume=False):
    try:
        run(config, resume)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_random_is_rank_local_too(embedded_cache, tmp_path, world2):
    """Fault: the baseline of a rank-local run draws from all candidates and is no baseline for it."""
    config = recipe(
        embedded_cache,
        tmp_path,
        "random",
        selection={"scope": "rank_local", "strategy": "random"},
        training={"train_steps": 3},
    )
    result = world2.run(run, config)[0]
    for step in range(3):
        assert sum(of_step(result, "selected", step)[: N // 2]) == K // 2


def test_sizes_that_do_not_divide_are_refused():
    """Fault: a share of K or N that is not whole is rounded, and a rank selects more than it is offered."""
    raw = to_dict(recipe_of(K=12, rho=0.75))
    for dp, message in ((8, "training.global_batch_size: expected a multiple of 8"), (3, "rho: expected a multiple")):
        if dp == 3:
            raw["selection"]["rho"] = 0.6  # N = 20
        with pytest.raises(ConfigError, match=message):
            validate_world(from_dict(raw), dp)


def recipe_of(K: int, rho: float):
    return from_dict(
        {
            "name": "sizes",
            "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1},
            "training": {"global_batch_size": K},
            "selection": {"scope": "rank_local", "rho": rho},
        }
    )


def test_a_fallback_of_one_rank_is_one_of_the_step():
    """Fault: the reason of a rank's fallback is lost, or its missing utilities shift those of the next rank."""
    groups = Groups(dp_size=2)  # no process group: both ranks decide alike
    drawn = Selection(indices=torch.tensor([2, 0]), fallback="no scores", diagnostics={"excluded": 3.0})
    signals, merged = rank_local.merge(Signals(finite=torch.tensor([True, False, False])), drawn, 3, groups)
    assert merged.indices.tolist() == [2, 5, 0, 3]
    assert merged.fallback == "data-parallel rank 0: no scores; data-parallel rank 1: no scores"
    assert merged.diagnostics == {"excluded": 6.0}
    assert signals.finite.tolist() == [True, False, False] * 2
    scored = torch.arange(3, dtype=torch.float64)
    joined = rank_local._joined([None, scored], 3)
    assert joined[:3].isnan().all()
    assert torch.equal(joined[3:], scored)
