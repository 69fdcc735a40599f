"""Scores of sequences whose tokens lie on several ranks, against one process.

Megatron's own context parallelism needs Transformer Engine and a GPU. Here a plain model computes the same thing: every
rank has its chunks of each sequence, and attention gathers keys and values of all ranks.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from partitions import relative
from small_models import TinyGPT, random_batch, token_losses, train
from torch import Tensor
from torch.nn import functional

from megatron_opus.config import ConfigError, PreconditionerConfig, SelectionConfig, SketchConfig
from megatron_opus.scoring.windows import own_tokens
from megatron_opus.types import Batch, Fragment, Groups

N, K_P, LENGTH = 8, 4, 16
TOLERANCE = 1e-5


def selection(alignment: str, scope: str = "layer", form: str = "separable", **more: Any) -> SelectionConfig:
    operator = "materialise" if form == "exact" else "two_sided"
    sketch = SketchConfig(operator=operator, dim=256, alignment=alignment, one_sided_dim=12, scope=scope)
    return SelectionConfig(sketch=sketch, preconditioner=PreconditionerConfig(form=form), score_length=LENGTH, **more)


ESTIMATORS = {
    "one_sided": selection("one_sided"),
    "features": selection("features", "model"),
    "direction": selection("direction"),
    "materialise, exact": selection("features", form="exact"),
    "one_sided, output layer": selection("one_sided", score_output_layer=True),
    "one_sided, micro-batches": selection("one_sided", score_micro_batch_size=2),
}


class _Gathered(torch.autograd.Function):
    """All ranks' tokens [cp, B, T / cp, d]; the gradient of each rank's own comes from all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


def context_losses(model: TinyGPT, batch: Batch, group: Any) -> Tensor:
    """Token losses of this rank's tokens: `token_losses` of small_models.py, with keys and values from all ranks."""
    positions = batch.position_ids
    x = model.embed(batch.tokens) + model.position(positions)
    everywhere = _Gathered.apply(positions.float(), group).transpose(0, 1).flatten(1)  # [B, T]
    mask = (everywhere[:, None, :] <= positions[..., None])[:, None]
    for block in model.blocks:
        b, t, d = x.shape
        heads = block.heads
        q, k, v = block.qkv(block.norm_1(x)).view(b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        k, v = (_Gathered.apply(y, group).permute(1, 2, 0, 3, 4).flatten(2, 3) for y in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + block.proj(y.transpose(1, 2).reshape(b, t, d))
        x = x + block.fc2(functional.gelu(block.fc1(block.norm_2(x))))
    logits = model.lm_head(model.norm(x))
    return functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")


class CutState:
    """AdamW's state, cut over the ranks of the data x context group as a distributed optimizer does."""

    sharded_over_dp = True

    def __init__(self, inner: Any, groups: Groups) -> None:
        self._inner, self._rank, self._size = inner, groups.state_rank, groups.state_size
        self.hypers = inner.hypers
        self.momentum = inner.momentum

    def second_moment(self, weight: Any) -> list[Fragment]:
        (whole,) = self._inner.second_moment(weight)
        n = whole.values.numel()
        start, stop = (n * (self._rank + i) // self._size for i in (0, 1))
        return [Fragment(start=start, values=whole.values[start:stop])]


def groups_of(cp: int) -> Groups:
    """Neighbouring ranks share sequences, as in Megatron's order tp-cp-dp."""
    world, rank = dist.get_world_size(), dist.get_rank()
    dp = world // cp
    made = {}
    for name, blocks in (
        ("cp", [range(i * cp, (i + 1) * cp) for i in range(dp)]),
        ("dp", [range(i, world, cp) for i in range(cp)]),
    ):
        for ranks in blocks:
            group = dist.new_group(list(ranks))
            if rank in ranks and len(ranks) > 1:
                made[name] = group
    return Groups(
        **made, cp_rank=rank % cp, cp_size=cp, dp_rank=rank // cp, dp_size=dp,
        state=dist.group.WORLD, state_rank=rank, state_size=world, tokens=made["cp"], shares=1,
    )  # fmt: skip


def scores(estimator: str, cp: int, fault: str = "") -> dict[str, Any]:
    from megatron_opus.backends.engines.base import WholeModelRunner
    from megatron_opus.backends.engines.optimizer_state import optimizer_state
    from megatron_opus.backends.model.plain_layers import plain_layers
    from megatron_opus.scoring import scoring_pass
    from megatron_opus.scoring.loss_pass import LossPass

    config, cpu = ESTIMATORS[estimator], torch.device("cpu")
    model = TinyGPT(seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5)
    train(model, optimizer, 2)
    groups = Groups() if cp == 1 else groups_of(cp)
    if fault == "state of the data-parallel group":
        groups = Groups(**{**vars(groups), "state": groups.dp})
    if fault == "no sum over the context":
        groups = Groups(**{**vars(groups), "tokens": None})
    losses = token_losses if cp == 1 else (lambda m, b: context_losses(m, b, groups.cp))
    runner = WholeModelRunner(model, losses, cpu)
    state: Any = optimizer_state(optimizer)
    scorer = scoring_pass.ScoringPass(
        runner, plain_layers(model, config), state if cp == 1 else CutState(state, groups), config,
        groups=groups, device=cpu, verify=runner,
    )  # fmt: skip
    candidates, proxy = random_batch(N, LENGTH, seed=1, masked=True), random_batch(K_P, LENGTH, seed=2)
    n, p, r = N // groups.dp_size, K_P // groups.dp_size, groups.dp_rank
    own = candidates.rows(r * n, (r + 1) * n)
    wrong = _own_count if fault == "own tokens counted" else scoring_pass.ScoringPass._counted_tokens
    with mock.patch.object(scoring_pass.ScoringPass, "_counted_tokens", wrong):
        signals = scorer(own, proxy.rows(r * p, (r + 1) * p))
    alone = LossPass(runner, config, groups=groups, device=cpu)(own)
    return {
        "align": signals.alignment, "inter": signals.interaction, "loss": signals.loss, "loss pass": alone.loss,
        "verified": scorer.verified,
    }  # fmt: skip


def _own_count(self: Any, windows: Any) -> Tensor:
    return torch.stack([own_tokens(x, self._groups).loss_mask.sum(1) for x in windows]).sum(0).clamp(min=1)


LAYOUTS = {"CP 2": 2, "CP 2 x DP 2": 2, "CP 4": 4}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_are_those_of_one_process(
    world2: Any, world4: Any, partition_table: Any, estimator: str, layout: str
) -> None:
    """Guards against sums over a part of a sequence, means over one rank's tokens, gradients that are added up over the
    data-parallel ranks alone, and state of another group. The window is longer than any rank's share of it."""
    if layout != "CP 2 x DP 2" and estimator not in ("one_sided", "features"):
        pytest.skip("one layout for every estimator, every layout for two of them")
    truth = scores(estimator, 1)
    pool = world2 if layout == "CP 2" else world4
    for found in pool.run(scores, estimator, LAYOUTS[layout]):
        partition_table.check(
            found, truth["align"], truth["inter"], against="one process", estimator=estimator,
            layout=f"plain GPT, tokens cut by hand, {layout}, AdamW, state cut", tolerance=TOLERANCE,
        )  # fmt: skip
        torch.testing.assert_close(found["loss"], truth["loss"], rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(found["loss pass"], truth["loss"], rtol=TOLERANCE, atol=0)
        assert "were compared with autograd's" in found["verified"]


@pytest.mark.parametrize("fault", ["state of the data-parallel group", "no sum over the context", "own tokens counted"])
def test_the_faults_are_seen(world4: Any, fault: str) -> None:
    """Guards against the test above being blind: each trap put back moves the alignments."""
    truth = scores("one_sided", 1)
    for found in world4.run(scores, "one_sided", 2, fault):
        assert relative(found["align"], truth["align"]) > 100 * TOLERANCE


def test_a_length_that_cannot_be_cut() -> None:
    """Guards against tokens that no rank has."""
    batch = random_batch(2, 16)
    cut = [own_tokens(batch, Groups(cp_rank=rank, cp_size=2)).position_ids[0].tolist() for rank in (0, 1)]
    assert cut == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]
    with pytest.raises(ConfigError, match="expected a multiple of 8, got 18"):
        own_tokens(random_batch(2, 18), Groups(cp_size=4))
