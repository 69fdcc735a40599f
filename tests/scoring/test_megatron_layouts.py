"""Every optimizer of Megatron's engine in every layout: scores against the float64 oracle and the unsharded sketch.

One process trains and scores first, and the oracle is computed from its weights and optimizer state. Every layout
trains the same steps by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distributed import DistributedPool
from forms import mostly_whole
from gpt_runs import GPT2, LENGTH, batch_of_step, recipe, share_of_rank, start
from megatron_muon import needs_muon
from partitions import drawn
from small_models import random_batch

from megatron_opus.config import OptimizerConfig, PreconditionerConfig, RunConfig, SelectionConfig, SketchConfig
from megatron_opus.layout.model_layout import recipe_layout
from megatron_opus.types import AdamHyper, MuonHyper

N, K_P, STEPS = 8, 4, 2
REPLICATED = {"use_distributed_optimizer": False}
# eps: some gradients are 0 but for rounding, and the first steps of AdamW divide them by their own size
ADAMW = {"lr": 3e-3, "adam_eps": 1e-5, "lr_warmup_steps": 2}
MUON = {**ADAMW, "name": "muon", "muon_lr": 1e-3, "muon_fp32_matmul_prec": "highest"}
OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AdamW": (ADAMW, REPLICATED),
    "AdamW, distributed": (ADAMW, {}),
    "SGD": ({"name": "sgd", "lr": 0.1, "sgd_momentum": 0.9, "lr_warmup_steps": 2}, REPLICATED),
    "Muon, whole matrices": ({**MUON, "muon_tp_mode": "duplicated"}, REPLICATED),
    "Muon, shards": (MUON, REPLICATED),
}
# (processes, what the recipe says)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP 2": (2, {}),
    "TP 2": (2, {"tp": 2}),
    "TP 2, SP": (2, {"tp": 2, "sp": True}),
    "PP 2": (2, {"pp": 2}),
    "TP 2, SP x DP 2": (4, {"tp": 2, "sp": True}),
    "TP 2, SP x PP 2": (4, {"tp": 2, "sp": True, "pp": 2}),
    "PP 2 x DP 2": (4, {"pp": 2}),
    "PP 4, interleaved": (4, {"pp": 4, "vpp": 2, "layers": 8}),
}
ONE_SIDED = SketchConfig(dim=256, alignment="one_sided", one_sided_dim=12)
ESTIMATORS: dict[str, tuple[str, dict[str, Any]]] = {
    # room for every number of a matrix: the features are the preconditioned gradients themselves
    "two_sided without collisions": (
        "oracle",
        {"sketch": SketchConfig(dim=2**14, alignment="features", scope="layer")},
    ),
    "one_sided, one scope": ("one process", {"sketch": ONE_SIDED}),
    "one_sided, toward the update": ("one process", {"sketch": ONE_SIDED, "target": "update"}),
}
# Float32 sums in another order, through two training steps. Measured: 3e-7 at most, and against the oracle, whose
# interactions are sums in float64, 3.5e-6. Newton-Schulz multiplies the rounding of the smallest singular directions by
# up to 485, in the training step and in the multiplier. Measured: 1.5e-4 at most.
TOLERANCE, AGAINST_ORACLE, NEWTON_SCHULZ = 1e-6, 1e-5, 1e-3


def config_of(
    optimizer: str, *, tp: int = 1, sp: bool = False, pp: int = 1, vpp: int | None = None, layers: int = 4
) -> RunConfig:
    keys, parallel = OPTIMIZERS[optimizer]
    stages = {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": vpp}
    model = dataclasses.replace(GPT2, num_layers=layers)
    parallel = {"engine": "megatron", **stages, **parallel}
    config = recipe(tp=tp, sp=sp, model=model, micro_batch_size=1, parallel=parallel)
    return dataclasses.replace(config, optimizer=OptimizerConfig(**keys))


def train_and_score(optimizer: str, layout: dict[str, Any], with_oracle: bool = False) -> dict[str, Any]:
    from megatron_opus.backends.model.scored_layers import megatron_layers
    from megatron_opus.scoring.scoring_pass import ScoringPass

    config = config_of(optimizer, **layout)
    engine, groups = start(config)
    steps = []
    for step in range(STEPS):
        result = engine.train_step(share_of_rank(batch_of_step(step), groups, 1))
        steps.append((result.loss, result.grad_norm))
    candidates, proxy = random_batch(N, LENGTH, seed=1, masked=True), random_batch(K_P, LENGTH, seed=2)
    n, p, r = N // groups.dp_size, K_P // groups.dp_size, groups.dp_rank
    found: dict[str, Any] = {"steps": steps}
    for name, (_, estimator) in ESTIMATORS.items():
        selection = SelectionConfig(
            **estimator,
            preconditioner=PreconditionerConfig(form="separable"),
            score_length=LENGTH,
            score_micro_batch_size=1,
        )
        layers = megatron_layers(engine.module, recipe_layout(config), selection)
        state = engine.optimizer_state()
        scorer = ScoringPass(engine.runner(), layers, state, selection, groups=groups, device=engine.device)
        signals = scorer(candidates.rows(r * n, (r + 1) * n), proxy.rows(r * p, (r + 1) * p))
        found[name] = {"align": signals.alignment, "inter": signals.interaction}
        found["geometry"] = signals.geometry
    if with_oracle:
        found["oracle"] = oracle(engine, layers, state, candidates, proxy)
    return found


def train(optimizer: str, layout: dict[str, Any], scored: bool) -> dict[str, Any]:
    """Train three steps, with a scoring pass before each of them or without; losses, norms, weights and state."""
    from megatron_opus.backends.engines.megatron.muon import leaves
    from megatron_opus.backends.model.scored_layers import megatron_layers
    from megatron_opus.backends.model.stages import named_parameters
    from megatron_opus.scoring.scoring_pass import ScoringPass

    config = config_of(optimizer, **layout)
    engine, groups = start(config)
    layers = megatron_layers(engine.module, recipe_layout(config), SelectionConfig())
    scorer = ScoringPass(
        engine.runner(), layers, engine.optimizer_state(), SelectionConfig(), groups=groups, device=engine.device
    )
    mine = [random_batch(2, LENGTH, seed=10 * groups.dp_rank + i) for i in range(2)]
    steps = []
    for step in range(STEPS + 1):
        if scored:
            assert torch.isfinite(scorer(*mine).alignment).all()
        result = engine.train_step(share_of_rank(batch_of_step(step), groups, 1))
        steps.append((result.loss, result.grad_norm))
    found = {name: p.detach().clone() for name, p in named_parameters(engine.module)}
    states = [state for part, _ in leaves(engine._optimizer) for state in part.optimizer.state.values()]
    for i, state in enumerate(states):
        found |= {f"state {i} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return {"steps": steps, "tensors": found}


def oracle(engine: Any, layers: Any, state: Any, candidates: Any, proxy: Any) -> dict[str, torch.Tensor]:
    """Utilities from gradients of one sequence at a time in float64, with the preconditioner of each weight's state."""
    from megatron_opus.backends.model.gpt import forward_loss
    from megatron_opus.selection import reference
    from megatron_opus.selection.precondition import adam_kappa, separable_factors

    weights = {x.name: x.weight for x in layers}
    hypers = dict(zip(weights, state.hypers(list(weights.values())), strict=True))

    def of(fragments: Any, weight: torch.Tensor) -> torch.Tensor:
        return fragments[0].values.view_as(weight).double()

    def precondition(gradients: reference.Gradients) -> reference.Gradients:
        out = {}
        for name, g in gradients.items():
            h, w = hypers[name], weights[name]
            if isinstance(h, AdamHyper):
                v = of(state.second_moment(w), w)
                r, c = separable_factors(v.sum(1), v.sum(0), h)
                out[name] = adam_kappa(h) * torch.outer(r.double(), c.double()) * g
            elif isinstance(h, MuonHyper):
                out |= reference.muon_preconditioner({name: of(state.momentum(w), w)}, {name: h})({name: g})
            else:
                out[name] = h.lr * g
        return out

    gradients = [
        reference.per_sequence_gradients(lambda b: forward_loss(engine.module, b), batch, weights)
        for batch in (candidates, proxy)
    ]
    align, inter = reference.scores(*gradients, precondition)
    return {"align": align, "inter": inter}


@pytest.fixture(scope="module")
def alone() -> Iterator[Any]:
    pool = DistributedPool(1)

    @functools.cache
    def run(optimizer: str, layers: int) -> Any:
        return pool.run(train_and_score, optimizer, {"layers": layers}, with_oracle=True)[0]

    yield run
    pool.close()


def check(
    results: Any, truth: Any, table: Any, layout: str, optimizer: str, against: dict[str, tuple[str, Any]]
) -> None:
    for found in results:
        assert found["geometry"] == truth["geometry"]
        for (loss, norm), (want, want_norm) in zip(found["steps"], truth["steps"], strict=True):
            assert (loss, norm) == pytest.approx((want, want_norm), rel=2e-5)
        for estimator, (what, want) in against.items():
            tolerance = AGAINST_ORACLE if what == "oracle" else TOLERANCE
            tolerance = NEWTON_SCHULZ if optimizer.startswith("Muon") else tolerance
            table.check(
                found[estimator], want["align"], want["inter"],
                against=what, layout=f"gpt2, Megatron's engine, {layout}, {optimizer}", estimator=estimator,
                tolerance=tolerance,
            )  # fmt: skip
            ids = drawn(found[estimator]["align"], found[estimator]["inter"])
            assert ids == drawn(want["align"], want["inter"]), (layout, optimizer, estimator)


def cases(short: Callable[[str, str], bool], *layouts: str) -> list[Any]:
    """Every optimizer in every one of `layouts`."""
    found = mostly_whole(itertools.product((x for x in OPTIMIZERS if "shards" not in x), layouts), short)
    return [
        pytest.param(*x.values, marks=[*x.marks, needs_muon]) if x.values[0].startswith("Muon") else x for x in found
    ]


# Short: AdamW, whose state Megatron cuts, in every layout; the others in the two that are put together of the most
BOTH = ("TP 2, SP x DP 2", "PP 4, interleaved")


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    cases(lambda optimizer, layout: optimizer == "AdamW, distributed" or layout in BOTH, *LAYOUTS),
)
def test_every_optimizer_in_every_layout(
    world2: Any, world4: Any, alone: Any, partition_table: Any, optimizer: str, layout: str
) -> None:
    """Guards against state of one optimizer that is read from the wrong place in one layout alone, a factor between
    the optimizer and the score that is lost there, and ids that differ from one process."""
    world, arguments = LAYOUTS[layout]
    truth = alone(optimizer, arguments.get("layers", 4))
    results = (world2 if world == 2 else world4).run(train_and_score, optimizer, arguments)
    against = {
        name: ("oracle", truth["oracle"]) if what == "oracle" else (f"unsharded sketch, {what}", truth[name])
        for name, (what, _) in ESTIMATORS.items()
    }
    check(results, truth, partition_table, layout, optimizer, against)


@needs_muon
@pytest.mark.parametrize("layout", ["DP 2", "PP 2 x DP 2", "PP 4, interleaved"])
def test_muon_on_shards_where_nothing_is_cut(
    world2: Any, world4: Any, alone: Any, partition_table: Any, layout: str
) -> None:
    """Guards against Megatron's default mode read as another one: without tensor parallelism both are the same."""
    world, arguments = LAYOUTS[layout]
    truth = alone("Muon, shards", arguments.get("layers", 4))
    results = (world2 if world == 2 else world4).run(train_and_score, "Muon, shards", arguments)
    against = {name: ("oracle" if what == "oracle" else "unsharded sketch, one process",
                      truth["oracle"] if what == "oracle" else truth[name])
               for name, (what, _) in ESTIMATORS.items()}  # fmt: skip
    check(results, truth, partition_table, layout, "Muon, shards", against)


@needs_muon
@pytest.mark.parametrize("layout", ["TP 2, SP", "TP 2, SP x DP 2", "TP 2, SP x PP 2"])
def test_muon_on_shards_of_tensor_parallel_ranks(world2: Any, world4: Any, partition_table: Any, layout: str) -> None:
    """Guards against a shard's own multiplier applied to another rank's part. Each shard is a matrix of its own there,
    so that the truth has the same degree."""
    world, arguments = LAYOUTS[layout]
    truth = world2.run(train_and_score, "Muon, shards", LAYOUTS["TP 2"][1])[0]
    results = (world2 if world == 2 else world4).run(train_and_score, "Muon, shards", arguments)
    check(results, truth, partition_table, layout, "Muon, shards",
          {name: ("the same at TP 2", truth[name]) for name in ESTIMATORS})  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    cases(
        lambda optimizer, layout: optimizer.startswith("Muon") or (optimizer == "SGD") == layout.startswith("TP"),
        *("TP 2, SP x PP 2", "PP 4, interleaved"),
    ),
)
def test_scoring_disturbs_no_optimizer_over_stages(world4: Any, optimizer: str, layout: str) -> None:
    """Guards against a pass over pipeline stages that leaves a gradient, a momentum or a schedule changed."""
    arguments = LAYOUTS[layout][1]
    never, always = (world4.run(train, optimizer, arguments, scored) for scored in (False, True))
    for without, scored in zip(never, always, strict=True):
        assert scored["steps"] == without["steps"]
        assert scored["tensors"].keys() == without["tensors"].keys()
        for name, value in without["tensors"].items():
            assert torch.equal(scored["tensors"][name], value), name
