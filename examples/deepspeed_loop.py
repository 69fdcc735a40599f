"""OPUS beside a DeepSpeed engine, on one CPU process: `python examples/deepspeed_loop.py`. It takes seconds,
once DeepSpeed has compiled its communication for CPUs.

The scorer reads the optimizer state out of the engine, at any ZeRO stage. The engine takes its ordinary step.
"""

from __future__ import annotations

import os
import socket

import deepspeed
import numpy as np
import torch
from own_loop import LENGTH, PROXY, VOCAB, K, N, TinyModel, counting, loss_of

import megatron_opus
from megatron_opus.api import as_batch
from megatron_opus.config import SelectionConfig
from megatron_opus.selection.strategies import build_strategy
from megatron_opus.types import Candidates

STEPS = 20
SETTINGS = {
    "train_batch_size": K,
    "zero_optimization": {"stage": 2},
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 1.0,
}


def start_process_group() -> None:
    """Start torch.distributed with this process alone, on a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def main() -> None:
    start_process_group()
    torch.manual_seed(0)
    model = TinyModel()
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=SETTINGS)

    config = SelectionConfig(score_length=LENGTH)
    scorer = megatron_opus.build_scorer(model, engine, config=config)  # the bare model, and the engine as optimizer
    strategy = build_strategy(config)
    data, draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    for step in range(1, STEPS + 1):
        noise = torch.randint(0, VOCAB, (3 * N // 4, LENGTH + 1), generator=data)
        buffer = torch.cat([counting(N // 4, data), noise]).to(engine.device)
        proxy = counting(PROXY, data).to(engine.device)
        candidates = Candidates(step=step, sample_ids=np.arange(N), domains=np.zeros(N, np.int32))
        signals = scorer(as_batch(buffer), as_batch(proxy), interaction=True)
        chosen = strategy.select(candidates, signals, K, draws).indices
        loss = loss_of(engine, buffer[chosen])
        engine.backward(loss)
        engine.step()
        useful = int((chosen < N // 4).sum())
        if step % 5 == 0:
            print(f"step {step:2d}  loss {loss.item():.3f}  {useful} of {K} drawn sequences count  {signals.geometry}")


if __name__ == "__main__":
    main()
