"""Scores in the geometry of Muon against the float64 oracle, toward the proxy's gradient and toward its update."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import token_losses
from test_estimators import CPU, relative, runner_of, select, setup

from megatron_opus.backends.model.plain_layers import plain_layers
from megatron_opus.config import PreconditionerConfig
from megatron_opus.scoring.scoring_pass import ScoringPass
from megatron_opus.selection import reference
from megatron_opus.types import Fragment, Groups, MuonHyper, ScoredLayer


class MuonState:
    """Momenta and hyper-parameters as a Muon optimizer keeps them, whole, in one process."""

    sharded_over_dp = False

    def __init__(self, layers: list[ScoredLayer]) -> None:
        generator = torch.Generator().manual_seed(8)
        self.q = {x.name: 1e-3 * torch.randn(x.weight.shape, generator=generator) for x in layers}
        self.names = {id(x.weight): x.name for x in layers}

    def hypers(self, weights, geometry="auto"):
        return [
            MuonHyper(
                lr=0.02,
                momentum=0.95,
                nesterov=True,
                scale=max(1.0, w.shape[0] / w.shape[1]) ** 0.5,
                coefficients=((3.4445, -4.7750, 2.0315),) * 5,
                step=2,
            )
            for w in weights
        ]

    def second_moment(self, weight):
        raise AssertionError("Muon has none")

    def momentum(self, weight):
        return [Fragment(start=0, values=self.q[self.names[id(weight)]].flatten())]


@pytest.mark.parametrize(
    ("alignment", "operator", "target"),
    [
        ("features", "two_sided", "gradient"),
        ("features", "materialise", "gradient"),
        ("one_sided", "two_sided", "gradient"),
        ("direction", "two_sided", "gradient"),
        ("one_sided", "two_sided", "update"),
        ("direction", "two_sided", "update"),
    ],
)
def test_muon_geometry_agrees_with_the_oracle(alignment, operator, target):
    """Fault: Muon's momentum read nowhere, and the layer scored with the identity and without a rate (defect 3). Toward
    the proxy's own update: Muon's matrix, which is not diagonal, applied once or from both sides."""
    model, _, candidates, proxy = setup()
    layers = plain_layers(model)
    state, weights = MuonState(layers), {x.name: x.weight for x in layers}
    hypers = dict(zip(weights, state.hypers(list(weights.values())), strict=True))
    gradients = [
        reference.per_sequence_gradients(lambda b: token_losses(model, b), batch, weights)
        for batch in (candidates, proxy)
    ]
    precondition = reference.muon_preconditioner(state.q, hypers)
    align, inter = reference.scores(*gradients, precondition)
    if target == "update":
        of_proxy = precondition({n: sum(g[n] for g in gradients[1]) / len(gradients[1]) for n in weights})
        align = torch.stack([sum((precondition(g)[n] * of_proxy[n]).sum() for n in weights) for g in gradients[0]])
    config = select(alignment, operator=operator, target=target)
    scorer = ScoringPass(runner_of(model), layers, state, config, groups=Groups(), device=CPU)
    found = scorer(candidates, proxy)
    assert found.geometry == "muon"
    assert relative(found.alignment, align) < (2e-2 if operator == "materialise" else 1e-4)
    assert relative(found.interaction, inter) < (2e-2 if operator == "materialise" else 1e-4)
    one_step = dataclasses.replace(config, preconditioner=PreconditionerConfig(muon_steps=1))
    scorer = ScoringPass(runner_of(model), layers, state, one_step, groups=Groups(), device=CPU)
    assert relative(scorer(candidates, proxy).alignment, align) > 0.1
