"""OPUS in a training loop of plain PyTorch: `python examples/own_loop.py`. It takes seconds on one CPU core.

The target is counting with a fixed stride. A quarter of the candidates count, three quarters are random tokens. The
loop trains two models from equal weights, one with OPUS and one with random selection, and prints the target's loss.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import megatron_opus
from megatron_opus.api import as_batch
from megatron_opus.config import SelectionConfig
from megatron_opus.selection.strategies import build_strategy
from megatron_opus.types import Candidates

VOCAB, LENGTH, N, K, PROXY, STEPS = 64, 32, 32, 8, 8, 60


class TinyModel(nn.Module):
    """Predicts the next token from the last two; [B, L] token ids -> [B, L, VOCAB] logits."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.fc1, self.fc2 = nn.Linear(2 * width, 4 * width), nn.Linear(4 * width, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        previous = functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.fc2(functional.gelu(self.fc1(torch.cat([x, previous], dim=-1))))


def counting(rows: int, generator: torch.Generator) -> Tensor:
    """[rows, LENGTH + 1] token ids: each row counts up with its own stride, modulo VOCAB."""
    start = torch.randint(0, VOCAB, (rows, 1), generator=generator)
    stride = torch.randint(1, 5, (rows, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH + 1)) % VOCAB


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])


def train(strategy_name: str) -> list[float]:
    """Train for STEPS steps; returns the loss on held-out target sequences after every tenth step."""
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    config = SelectionConfig(strategy=strategy_name, score_length=LENGTH)
    scorer = megatron_opus.build_scorer(model, optimizer, config=config)
    strategy = build_strategy(config)
    data, draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    held_out, losses = counting(64, torch.Generator().manual_seed(3)), []
    for step in range(1, STEPS + 1):
        noise = torch.randint(0, VOCAB, (3 * N // 4, LENGTH + 1), generator=data)
        buffer, proxy = torch.cat([counting(N // 4, data), noise]), counting(PROXY, data)
        candidates = Candidates(step=step, sample_ids=np.arange(N), domains=np.zeros(N, np.int32))
        signals = scorer(as_batch(buffer), as_batch(proxy), interaction=True)
        chosen = strategy.select(candidates, signals, K, draws).indices
        optimizer.zero_grad()
        loss_of(model, buffer[chosen]).backward()
        optimizer.step()
        if step % 10 == 0:
            with torch.no_grad():
                losses.append(float(loss_of(model, held_out)))
            print(f"{strategy_name:>6}  step {step:3d}  loss on the target {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    opus, random = train("opus"), train("random")
    print(f"after {STEPS} steps: opus {opus[-1]:.3f}, random {random[-1]:.3f}")
