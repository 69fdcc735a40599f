"""Small plain models and batches for tests that need no parallelism."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_opus.types import Batch

VOCAB = 61


class Block(nn.Module):
    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.proj(y.transpose(1, 2).reshape(b, t, d)))
        return x + self.dropout(self.fc2(functional.gelu(self.fc1(self.norm_2(x)))))


class TinyGPT(nn.Module):
    """A GPT of plain torch layers: model(tokens [B, T]) -> logits [B, T, V]."""

    def __init__(self, d: int = 32, layers: int = 2, heads: int = 4, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.position = nn.Embedding(VOCAB, d), nn.Embedding(64, d)
        self.blocks = nn.ModuleList(Block(d, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch.tokens)
    return functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")


def random_batch(size: int, length: int = 16, seed: int = 0, masked: bool = False) -> Batch:
    """Sequences with very different statistics, so that their utilities differ."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(size):
        spread = 2 + (7 * i) % (VOCAB - 2)
        rows.append(torch.randint(0, spread, (length + 1,), generator=g))
    tokens = torch.stack(rows)
    mask = torch.ones(size, length)
    if masked:
        for i in range(size):
            mask[i, : (3 * i) % (length - 2)] = 0.0
    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=mask,
        position_ids=torch.arange(length).expand(size, length),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 100) -> None:
    for step in range(steps):
        batch = random_batch(4, seed=seed + step)
        optimizer.zero_grad()
        (token_losses(model, batch) * batch.loss_mask).sum().div(batch.loss_mask.sum()).backward()
        optimizer.step()
    optimizer.zero_grad()
