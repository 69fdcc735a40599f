"""OPUS against random through the hook, on real text: the embedded corpus as Megatron's own indexed files.

`-m slow -s` prints the losses that docs/megatron_lm.md quotes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron_lm_runs import LoopRuns, loop_runs

from megatron_opus.data import manifest

STEPS, SEEDS, K = 200, (1, 2, 3), 8
SHARES = {"prose": 0.1, "docstrings": 0.2, "source": 0.4, "tables": 0.3}  # of the blend; prose is what the target is
MODEL = (
    *("--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "128", "--max-position-embeddings", "128"),
    *("--micro-batch-size", "8", "--lr", "3e-3", "--eval-iters", "16", "--log-interval", "50"),
)
_LOSS = re.compile(r"on validation set \| lm loss value: (\S+)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopRuns]:
    yield from loop_runs(tmp_path_factory.mktemp("megatron_lm_gain"))


@pytest.mark.slow
def test_opus_lowers_the_loss_of_the_target(runs: LoopRuns, embedded_cache: Path) -> None:
    """Guards against a hook that selects, but not what lowers the target's loss: the target is prose."""
    [corpus] = [path.parent for path in embedded_cache.rglob("manifest.json")]
    vocabulary = manifest.read(corpus).tokenizer["vocab_size"]
    blend = [word for name, share in SHARES.items() for word in (f"{share}", f"{corpus}/candidates/{name}")]
    data = ("--train-data-path", *blend, "--valid-data-path", f"{corpus}/validation/prose")
    selection = {"score_micro_batch_size": 16, "score_length": 128, "proxy_batch_size": 8, "sketch": {"dim": 2048}}
    losses: dict[str, list[float]] = {"random": [], "opus": []}
    for seed in SEEDS:
        started = {
            strategy: runs.start(
                f"{strategy}{seed}",
                *(*MODEL, "--seed", f"{seed}", "--vocab-size", f"{vocabulary}", "--global-batch-size", f"{K}"),
                opus={
                    "selection": {**selection, "strategy": strategy},
                    "proxy": {"prefix": f"{corpus}/proxy/prose"},
                },
                data=data,
                length=("--train-iters", f"{STEPS}"),
            )
            for strategy in losses
        }
        for strategy, run in started.items():
            outcome = runs.finish(run)
            losses[strategy].append(float(_LOSS.findall(outcome.log)[-1]))
            rows = outcome.metrics()
            share = np.mean([row["selected_share"]["prose"] for row in rows])
            seconds = np.mean([row["choose_seconds"] / row["step_seconds"] for row in rows])
            print(f"seed {seed} {strategy}: loss {losses[strategy][-1]:.4f}, prose {share:.2f}, choosing {seconds:.2f}")
    difference = np.array(losses["opus"]) - np.array(losses["random"])
    print(f"opus - random: {difference.mean():.4f} +- {difference.std(ddof=1):.4f} ({difference})")
    assert (difference < 0).all()
