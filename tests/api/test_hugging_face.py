"""`megatron_opus.score` on models of transformers, against gradients of one sequence at a time."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from plain_oracle import EXACT, VOCAB, alignment, found, linear_weights, relative, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import megatron_opus
from megatron_opus.api import as_batch
from megatron_opus.config import ConfigError
from megatron_opus.types import Batch

N, LENGTH, PAD = 5, 12, 0


def qwen3(**changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "tie_word_embeddings": False}
    return Qwen3ForCausalLM(Qwen3Config(**{"vocab_size": VOCAB, **shape, **changes}))


def logits(model: nn.Module, **given: Any) -> Any:
    return lambda batch: model(batch.tokens, **given).logits.float()


@pytest.mark.parametrize("how", ["plain", "enable_input_require_grads", "gradient_checkpointing_enable"])
def test_inputs_that_need_gradients_change_nothing(how: str) -> None:
    """Guards against an error about compiled modules where the embedding's output needs a gradient: what gradient
    checkpointing of transformers, and PEFT with it, switch on. The first layer's output is then no leaf of ours."""
    model = qwen3()
    if how != "plain":
        getattr(model, how)()
    candidates, proxy = tokens(N), tokens(3, seed=4)
    model.eval()
    want = alignment(logits(model), linear_weights(model), as_batch(candidates), as_batch(proxy))
    model.train()
    assert relative(found(model, candidates, proxy).alignment, want) < 1e-5
    assert all(p.grad is None for p in model.parameters())


class Checkpointed(nn.Module):
    """Calls torch.utils.checkpoint itself, in either mode; None: not at all."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.wte, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.blocks:

            def run(y: Tensor, block: nn.Module = block) -> Tensor:
                return torch.tanh(block(y))

            x = x + (run(x) if self.reentrant is None else checkpoint(run, x, use_reentrant=self.reentrant))
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    """Guards against layers that are counted twice where the forward pass runs again in the backward pass, and against
    reentrant checkpoints, which give no graph under frozen weights and refuse torch.autograd.grad."""
    from torch.utils import checkpoint as module

    function = module.CheckpointFunction
    candidates, proxy = tokens(N), tokens(3, seed=4)
    plain = found(Checkpointed(None), candidates, proxy)
    got = found(Checkpointed(reentrant), candidates, proxy)
    assert relative(got.alignment, plain.alignment) < 1e-6
    assert module.CheckpointFunction is function


def test_gpt2_is_scored_whole() -> None:
    """Guards against GPT-2's Conv1D being passed over without a word: its weights are stored [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **shape)).eval()
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 2 and "wpe" not in n}
    candidates, proxy = tokens(N), tokens(3, seed=4)
    want = alignment(logits(model), weights, as_batch(candidates), as_batch(proxy))
    for kind in ("direction", "one_sided"):
        config = dataclasses.replace(
            EXACT,
            score_embedding=True,
            score_output_layer=True,
            sketch=dataclasses.replace(EXACT.sketch, alignment=kind, one_sided_dim=4096),
        )
        got = found(model, candidates, proxy, config)
        assert relative(got.alignment, want) < 1e-4
    assert got.coverage is not None
    assert 0.9 < got.coverage < 1
    assert any("positions" in sentence and "wpe" in sentence for sentence in got.left_out)


def padded(side: str) -> tuple[Batch, Batch]:
    """(N sequences with 0 to 4 pads on one side, the same as single unpadded sequences of their own lengths)."""
    whole, pads = tokens(N), [0, 1, 2, 3, 4]
    ids, mask, seen, positions = (torch.zeros(N, LENGTH, dtype=torch.int64) for _ in range(4))
    labels = torch.full((N, LENGTH), PAD)
    for z, pad in enumerate(pads):
        where = slice(pad, None) if side == "left" else slice(0, LENGTH - pad)
        ids[z, where], labels[z, where] = whole[z, : LENGTH - pad], whole[z, 1 : LENGTH - pad + 1]
        mask[z, where], seen[z, where], positions[z, where] = 1, 1, torch.arange(LENGTH - pad)
    given = Batch(tokens=ids, labels=labels, loss_mask=mask.float(), position_ids=positions)
    return given, dataclasses.replace(given, attention_mask=seen)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(side: str) -> None:
    """Guards against padding that tokens attend to. The truth is each sequence alone, without its padding."""
    model, proxy = qwen3(pad_token_id=PAD).eval(), as_batch(tokens(3, seed=4))
    without, batch = padded(side)
    rows = [tokens(N)[z : z + 1, : LENGTH - pad + 1] for z, pad in enumerate(range(N))]
    want = torch.cat([alignment(logits(model), linear_weights(model), as_batch(x), proxy) for x in rows])
    assert relative(found(model, batch, proxy).alignment, want) < 1e-5
    if side == "left":
        with pytest.raises(ConfigError, match=r"sequence 1 begins with padding .*attention_mask"):
            found(model, without, proxy)
    else:
        positions = torch.arange(LENGTH).expand(N, LENGTH)
        plain = dataclasses.replace(without, position_ids=positions)
        assert relative(found(model, plain, proxy).alignment, want) < 1e-5


class HandMadeExperts(nn.Module):
    """Experts in one raw parameter [experts, hidden, hidden], of a class that nothing here knows."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.stacked = nn.Parameter(torch.randn(experts, hidden, hidden) / hidden)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bte,btd,edf->btf", self.router(x).softmax(-1), x, self.stacked)


def test_experts_that_are_left_out_are_said() -> None:
    """Guards against the score of a quarter of a mixture of experts passing for that of the model."""
    model = qwen3()
    for layer in model.model.layers:
        layer.mlp = HandMadeExperts(32, 16)
    with pytest.warns(UserWarning, match=r"scored.*stacked") as caught:
        got = found(model, tokens(N), tokens(3, seed=4))
    trainable = [p for p in model.parameters() if p.dim() >= 2]
    share = sum(p.numel() for p in linear_weights(model).values()) / sum(p.numel() for p in trainable)
    assert got.coverage == pytest.approx(share)
    assert got.coverage < 0.5
    assert len(caught) == 1


def test_a_covered_model_gives_no_warning() -> None:
    """Guards against a warning that is always there and that nobody reads."""
    model = qwen3(num_hidden_layers=6)
    config = dataclasses.replace(EXACT, score_output_layer=True, score_embedding=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(model, tokens(N), tokens(3), config).coverage == 1.0


def test_adapters_are_scored_and_raw_ones_are_said() -> None:
    """Guards against adapters over frozen weights: those of linear layers are scored, raw parameters are named."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear, rank: int = 4) -> None:
            super().__init__()
            self.base = base
            self.lora_A, self.lora_B = nn.Linear(32, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
            self.scale = nn.Parameter(torch.randn(2, base.out_features))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.lora_B(self.lora_A(x)) * self.scale.sum(0)

    model = qwen3().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    model.enable_input_require_grads()
    model.eval()
    weights = {n: p for n, p in model.named_parameters() if "lora" in n}
    candidates, proxy = tokens(N), tokens(3, seed=4)
    want = alignment(logits(model), weights, as_batch(candidates), as_batch(proxy))
    got = found(model, candidates, proxy)
    assert relative(got.alignment, want) < 1e-5
    assert any("raw parameters" in sentence and "scale" in sentence for sentence in got.left_out)
    assert got.coverage is not None
    assert got.coverage < 1


def test_roles_do_not_come_from_names() -> None:
    """Guards against an output layer that is one by its name only: a hidden layer called lm_head, and an output layer
    with another name; likewise a token embedding called `positions`."""

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.table = nn.Embedding(VOCAB, 16), nn.Embedding(64, 16)
            self.lm_head, self.unembed = nn.Linear(16, 16), nn.Linear(16, VOCAB)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.positions(ids) + self.table(torch.arange(ids.shape[1]))
            return self.unembed(torch.tanh(self.lm_head(x)))

    model = Renamed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = [x.name for x in megatron_opus.build_scorer(model, optimizer).layers]
    assert names == ["lm_head"]
    config = dataclasses.replace(EXACT, score_output_layer=True, score_embedding=True)
    names = [x.name for x in megatron_opus.build_scorer(model, optimizer, config=config).layers]
    assert names == ["positions", "lm_head", "unembed"]
