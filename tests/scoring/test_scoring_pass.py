"""The scoring pass on plain torch models, against the materialised float64 oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import TinyGPT, random_batch, token_losses, train

import megatron_opus
from megatron_opus.backends.engines.optimizer_state import optimizer_state
from megatron_opus.backends.model.plain_layers import plain_layers
from megatron_opus.config import (
    ConfigError,
    PreconditionerConfig,
    RedundancyConfig,
    SelectionConfig,
    SketchConfig,
)
from megatron_opus.errors import UnsupportedOptimizer
from megatron_opus.scoring.capture import CaptureError
from megatron_opus.selection import reference

N, K_P = 6, 3


def setup(optimizer="adamw", steps=12, masked=False):
    model = TinyGPT()
    cls = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    opt = cls([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=2e-3)
    train(model, opt, steps)
    return model, opt, random_batch(N, seed=1, masked=masked), random_batch(K_P, seed=2, masked=masked)


def oracle(model, opt, candidates, proxy):
    weights = {layer.name: layer.weight for layer in plain_layers(model)}
    state = optimizer_state(opt)
    per_sequence = [
        reference.per_sequence_gradients(lambda b: token_losses(model, b), batch, weights)
        for batch in (candidates, proxy)
    ]
    if isinstance(opt, torch.optim.SGD):
        precondition = reference.sgd_preconditioner(opt.param_groups[0]["lr"])
    else:
        v = {n: opt.state[w].get("exp_avg_sq", torch.zeros(())) for n, w in weights.items()}
        precondition = reference.adamw_preconditioner(
            v, dict(zip(weights, state.hypers(list(weights.values())), strict=True))
        )
    return reference.scores(*per_sequence, precondition)


def wide(operator="materialise", form="exact", dim=2**21, **kwargs):
    """So many buckets that the sketch error is below the tolerance: what is left is the method itself."""
    return SelectionConfig(
        sketch=SketchConfig(operator=operator, dim=dim, alignment="features", scope="layer"),
        preconditioner=PreconditionerConfig(form=form),
        score_length=16,
        **kwargs,
    )


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("optimizer", "steps"), [("adamw", 12), ("adamw", 0), ("sgd", 3)])
def test_scores_agree_with_the_oracle(optimizer, steps, masked):
    """Fault: labels shifted twice (defect 1), candidate loss masks ignored (defect 5), a factor of the mean wrong, or
    the geometry of a fresh optimizer.

    two_sided with room for all indices has no collisions, so identity and SGD geometry agree to float32 rounding;
    materialise at m = 2^21 leaves a sketch error of about (2 / m)^0.5 = 1e-3 relative to |u||v|.
    """
    model, opt, candidates, proxy = setup(optimizer, steps, masked)
    align, inter = oracle(model, opt, candidates, proxy)
    exact = steps > 0 and optimizer == "adamw"
    config = wide() if exact else wide("two_sided", "separable")
    signals = megatron_opus.score(model, candidates, proxy, opt, config=config)
    assert signals.geometry == (
        "adamw-exact" if exact else "sgd" if optimizer == "sgd" else "sgd (no optimizer state yet)"
    )
    tolerance = 1e-2 if exact else 1e-5
    assert relative(signals.alignment, align) < tolerance
    assert relative(signals.interaction, inter) < tolerance
    losses = token_losses(model, candidates) * candidates.loss_mask
    torch.testing.assert_close(signals.loss, (losses.sum(1) / candidates.loss_mask.sum(1)).double())


@pytest.mark.parametrize("operator", ["two_sided", "materialise"])
def test_separable_adamw_ranks_like_the_exact_one(operator):
    """Fault: row and column factors swapped or applied to the proxy as well. Ranks against the oracle."""
    model, opt, candidates, proxy = setup()
    align, _ = oracle(model, opt, candidates, proxy)
    signals = megatron_opus.score(model, candidates, proxy, opt, config=wide(operator, "separable"))
    ranks = torch.stack([signals.alignment.argsort().argsort(), align.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.9  # six candidates: one swap of neighbours is 0.943
    assert torch.corrcoef(torch.stack([signals.alignment, align]))[0, 1] > 0.99


@pytest.mark.parametrize("alignment", ["one_sided", "direction"])
@pytest.mark.parametrize(("optimizer", "steps"), [("adamw", 12), ("sgd", 3)])
def test_the_target_may_be_the_proxys_own_update(optimizer, steps, alignment):
    """Fault: the preconditioner on one side of the sketch alone, or its kappa once where there are two updates.

    With buckets for every index nothing is sketched; what is left under AdamW is the separable second moment.
    """
    model, opt, candidates, proxy = setup(optimizer, steps)
    weights = {layer.name: layer.weight for layer in plain_layers(model)}
    one, other = (
        reference.per_sequence_gradients(lambda b: token_losses(model, b), batch, weights)
        for batch in (candidates, proxy)
    )
    if optimizer == "sgd":
        precondition = reference.sgd_preconditioner(opt.param_groups[0]["lr"])
    else:
        hypers = dict(zip(weights, optimizer_state(opt).hypers(list(weights.values())), strict=True))
        exact = alignment == "direction"
        v = {n: opt.state[w]["exp_avg_sq"] for n, w in weights.items()}
        v = v if exact else {n: x.sum(1, keepdim=True) * x.sum(0, keepdim=True) / x.sum() for n, x in v.items()}
        precondition = reference.adamw_preconditioner(v, hypers)
    target = precondition({n: sum(g[n] for g in other) / K_P for n in weights})
    truth = torch.stack([sum((precondition(g)[n] * target[n]).sum() for n in weights) for g in one])
    config = SelectionConfig(
        target="update",
        sketch=SketchConfig(alignment=alignment, one_sided_dim=4096, operator="materialise"),
        preconditioner=PreconditionerConfig(form="exact" if alignment == "direction" else "separable"),
        redundancy=RedundancyConfig(scale="off"),
        score_length=16,
    )
    found = megatron_opus.score(model, candidates, proxy, opt, config=config).alignment
    assert relative(found, truth) < 1e-5, relative(found, truth)


def test_sequences_of_one_pass_do_not_mix():
    """Fault: b of the batch mean instead of each sequence's own; the score then depends on the company."""
    model, opt, candidates, proxy = setup()
    config = wide("two_sided", "separable")
    together = megatron_opus.score(model, candidates, proxy, opt, config=config)
    for z in range(N):
        alone = megatron_opus.score(model, candidates.rows(z, z + 1), proxy, opt, config=config)
        torch.testing.assert_close(alone.alignment[0], together.alignment[z], rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 100])
def test_micro_batches_do_not_change_scores(size):
    """Fault: a chunk that straddles candidates and proxy writes into the wrong rows."""
    model, opt, candidates, proxy = setup()
    whole = megatron_opus.score(model, candidates, proxy, opt, config=wide("two_sided", "separable"))
    config = wide("two_sided", "separable", score_micro_batch_size=size)
    chunked = megatron_opus.score(model, candidates, proxy, opt, config=config)
    assert relative(chunked.alignment, whole.alignment) < 1e-5
    assert relative(chunked.interaction, whole.interaction) < 1e-5


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_scopes_estimate_the_same_numbers(scope):
    """Fault: layers that share one sketch with the same hashes are correlated, which biases the sum. Mean over 60
    seeds within 4 standard errors of the oracle."""
    model, opt, candidates, proxy = setup("sgd", 1)
    align, _ = oracle(model, opt, candidates, proxy)
    estimates = []
    for seed in range(60):
        config = SelectionConfig(sketch=SketchConfig(dim=256, seed=seed, scope=scope, alignment="features"))
        estimates.append(megatron_opus.score(model, candidates, proxy, opt, config=config).alignment)
    stacked = torch.stack(estimates)
    error = stacked.std(0) / 60**0.5
    assert ((stacked.mean(0) - align).abs() < 4 * error).all()


def test_nothing_is_disturbed():
    """Fault: a scoring pass that leaves gradients, modes, requires_grad flags or RNG changed alters the training run.

    With dropout on, the losses and weights of three steps are bit-identical with and without a pass before each.
    """

    def run(scored: bool):
        model = TinyGPT(dropout=0.2)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model.blocks[0].fc1.bias.requires_grad_(False)
        model.blocks[1].dropout.eval()
        torch.manual_seed(7)
        losses = []
        for step in range(3):
            batch = random_batch(4, seed=step)
            opt.zero_grad()
            loss = token_losses(model, batch).mean()
            (loss / 2).backward()
            if scored:  # between accumulation steps as well
                megatron_opus.score(model, random_batch(N, seed=9), random_batch(K_P, seed=8), opt)
            (token_losses(model, batch).mean() / 2).backward()
            opt.step()
            losses.append(loss.item())
        flags = [p.requires_grad for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        return losses, [p.detach().clone() for p in model.parameters()], flags, modes, torch.get_rng_state()

    plain, scored = run(False), run(True)
    assert plain[0] == scored[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], scored[1], strict=True))
    assert plain[2:4] == scored[2:4]
    assert torch.equal(plain[4], scored[4])


def test_state_is_restored_when_scoring_fails():
    """Fault: an exception in the pass leaves the model frozen and in evaluation mode."""
    model, opt, candidates, proxy = setup()
    with pytest.raises(ZeroDivisionError):
        megatron_opus.score(model, candidates, proxy, opt, token_losses=lambda m, b: 1 / 0)
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert all(not m._forward_hooks for m in model.modules())


def test_no_weight_gradient_is_computed():
    """Fault: the pass pays for weight gradients. A frozen weight's linear has no use for its input in backward."""
    model, opt, candidates, proxy = setup()
    before = [p.grad for p in model.parameters()]
    megatron_opus.score(model, candidates, proxy, opt)
    assert [p.grad for p in model.parameters()] == before

    seen = []

    def losses(m, batch):
        seen.extend(p.requires_grad for p in m.parameters())
        return token_losses(m, batch)

    megatron_opus.score(model, candidates, proxy, opt, token_losses=losses, verify=False)
    assert not any(seen)


def test_one_bad_candidate_is_marked_and_hurts_no_other():
    """Fault: one NaN candidate makes every score NaN. The bad one is poisoned through its loss mask weight."""
    model, opt, candidates, proxy = setup()
    clean = megatron_opus.score(model, candidates, proxy, opt)
    mask = candidates.loss_mask.clone()
    mask[2] = 0.0  # no token counts: 0 / 0
    signals = megatron_opus.score(model, dataclasses.replace(candidates, loss_mask=mask), proxy, opt)
    assert signals.finite.tolist() == [True, True, False, True, True, True]
    good = signals.finite
    torch.testing.assert_close(signals.alignment[good], clean.alignment[good], rtol=1e-5, atol=0)


@pytest.mark.parametrize("alignment", ["features", "one_sided"])
def test_proxy_momentum_averages_and_resumes(alignment):
    """Fault: a running proxy that is not bias-corrected, or lost on resume; an average of gradients that have their
    preconditioner in them, which would be that of an older step."""
    model, opt, candidates, proxy = setup("sgd", 1)
    other = random_batch(K_P, seed=77)
    without = wide("two_sided", "separable")
    without = dataclasses.replace(without, sketch=dataclasses.replace(without.sketch, alignment=alignment))
    config = dataclasses.replace(without, proxy_momentum=0.75)

    def plain(p):
        return megatron_opus.score(model, candidates, p, opt, config=without).alignment

    scorer = megatron_opus.build_scorer(model, opt, config=config)
    first = scorer(candidates, proxy).alignment
    saved = scorer.state_dict()
    second = scorer(candidates, other).alignment
    torch.testing.assert_close(first, plain(proxy), rtol=1e-5, atol=0)
    expected = (0.75 * 0.25 * plain(proxy) + 0.25 * plain(other)) / (1 - 0.75**2)
    assert relative(second, expected) < 1e-5
    resumed = megatron_opus.build_scorer(model, opt, config=config)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed(candidates, other).alignment, second)


def test_what_cannot_be_scored_raises():
    """Fault: zeros instead of an error (defect 4 of the reference: capture under torch.compile)."""
    model, opt, candidates, proxy = setup()
    with pytest.raises(ConfigError, match="no layer to score"):
        megatron_opus.score(torch.nn.Embedding(4, 4), candidates, proxy, opt)
    with pytest.raises(ConfigError, match="compile"):
        megatron_opus.score(torch.compile(model), candidates, proxy, opt)
    with pytest.raises(UnsupportedOptimizer, match="Adam"):
        megatron_opus.score(model, candidates, proxy, torch.optim.Adagrad(model.parameters()))
    with pytest.raises(UnsupportedOptimizer, match="no parameter group"):
        megatron_opus.score(model, candidates, proxy, torch.optim.AdamW([model.embed.weight]))
    with pytest.raises(ConfigError, match="unreduced"):
        megatron_opus.score(model, candidates, proxy, opt, token_losses=lambda m, b: token_losses(m, b).mean())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    config = SelectionConfig(preconditioner=PreconditionerConfig(kind="adamw"))
    with pytest.raises(UnsupportedOptimizer, match="no state for adamw"):
        megatron_opus.score(model, candidates, proxy, sgd, config=config)

    class Skips(TinyGPT):
        def forward(self, tokens):
            x = self.embed(tokens)
            return self.lm_head(self.norm(self.blocks[0](x)))

    skipping = Skips()
    with pytest.raises(CaptureError, match=r"blocks\.1\.qkv"):
        megatron_opus.score(skipping, candidates, proxy, torch.optim.AdamW(skipping.parameters()))


def test_tied_output_layers_are_left_out():
    """Fault: a tied weight's gradient has an embedding part that a linear layer's factors do not show."""
    model = TinyGPT()
    model.lm_head.weight = model.embed.weight
    assert not any("lm_head" in layer.name for layer in plain_layers(model, SelectionConfig()))
    assert any("lm_head" in layer.name for layer in plain_layers(TinyGPT(), SelectionConfig(score_output_layer=True)))


@pytest.mark.parametrize("layers", [1, 3])
def test_host_synchronisations_do_not_grow_with_layers(layers):
    """Fault: one .item() per parameter (defect 9 of the reference) stalls a GPU hundreds of times a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                self.reads += 1
            return func(*args, **(kwargs or {}))

    model = TinyGPT(layers=layers)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, opt, 2)
    scorer = megatron_opus.build_scorer(model, opt)
    scorer(random_batch(N, seed=1), random_batch(K_P, seed=2))  # compares itself with autograd, once
    with Count() as count:
        scorer(random_batch(N, seed=1), random_batch(K_P, seed=2))
    assert count.reads <= 4


def test_factors_are_freed_layer_by_layer(monkeypatch):
    """Fault: every layer's input kept until the whole backward pass is over, which doubles the memory of scoring."""
    import weakref

    from megatron_opus.scoring import capture
    from megatron_opus.selection.sketch import TwoSided

    kept, alive, layers = [], [], 8
    project, features = capture.project, TwoSided.features

    def recording_project(x, projection):
        out = project(x, projection)
        kept.append(weakref.ref(out))
        return out

    def counting_features(self, *args):
        alive.append(sum(ref() is not None for ref in kept))
        return features(self, *args)

    monkeypatch.setattr(capture, "project", recording_project)
    monkeypatch.setattr(TwoSided, "features", counting_features)
    model, opt, candidates, proxy = setup()
    config = SelectionConfig(sketch=SketchConfig(operator="two_sided", dim=64, alignment="features"), score_length=16)
    megatron_opus.score(model, candidates, proxy, opt, config=config, verify=False)
    assert layers == len(plain_layers(model))
    # the proxy, then the candidates: all inputs and one gradient at first, one of each in the end
    assert len(kept) == 4 * layers
    assert alive == [*range(layers + 1, 1, -1)] * 2


def test_the_scoring_window_is_honoured():
    """Fault: `score_length` ignored by the public function: 4k-token sequences are scored whole."""
    model, opt, candidates, proxy = setup()
    short = dataclasses.replace(wide("two_sided", "separable"), score_length=5)
    windowed = megatron_opus.score(model, candidates, proxy, opt, config=short)
    cut = megatron_opus.score(model, candidates.window(5), proxy.window(5), opt, config=wide("two_sided", "separable"))
    assert torch.equal(windowed.alignment, cut.alignment)


def test_an_in_place_activation_may_follow_a_scored_layer():
    """Fault: the first scored layer's output is a leaf, which nn.ReLU(inplace=True) must not write to."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(inplace=True), torch.nn.Linear(16, 61))
    model = torch.nn.Sequential(torch.nn.Embedding(61, 8), body)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    signals = megatron_opus.score(model, random_batch(N), random_batch(K_P, seed=3), opt)
    assert signals.finite.all()


def test_optimizers_that_only_look_like_adamw_are_refused():
    """Fault: state under other names is scored in SGD's geometry for ever; amsgrad divides by another moment."""
    model, _, candidates, proxy = setup()
    amsgrad = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(UnsupportedOptimizer, match="amsgrad"):
        megatron_opus.score(model, candidates, proxy, amsgrad)

    class AdamW(torch.optim.SGD):
        pass

    other = AdamW(model.parameters(), lr=0.1, momentum=0.9)
    train(model, other, 1)
    for group in other.param_groups:
        group.update(betas=(0.9, 0.99), eps=1e-8)
    with pytest.raises(UnsupportedOptimizer, match="AdamW, whose geometry is not known"):
        megatron_opus.score(model, candidates, proxy, other)
