"""OPUS against random through the hook, on real text: the lab's noisy corpus as Megatron's own indexed files.

The protocol is that of configs/lab/warm.yaml, at today's default temperature. Per seed, 300 steps of random selection
at a constant rate are the common start; from there each arm takes 200 steps of 16 out of 32 sequences:

    random      uniform draws from the offered candidates
    opus        OPUS with the held-out prose as its target
    shares      uniform draws from a blend whose weights are the shares of the datasets that `opus` had chosen

`--experiments -s` prints losses and shares. docs/megatron_lm.md has the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_lm_runs import LoopRuns, Outcome, loop_runs

from megatron_opus.backends.formats import indexed
from megatron_opus.data import manifest
from megatron_opus.studies.lab.corpora import prepare_lab

START, STEPS, SEEDS, K = 300, 500, (1, 2, 3), 16  # STEPS: with those of the start
SHARES = {"prose": 0.1, "docstrings": 0.2, "source": 0.3, "noise": 0.4}  # of the blend; prose is what the target is
SETTINGS = (
    *("--num-layers", "3", "--hidden-size", "128", "--seq-length", "128", "--max-position-embeddings", "128"),
    *("--micro-batch-size", "4", "--lr", "1e-3", "--min-lr", "1e-4", "--lr-warmup-iters", "30"),
    *("--lr-decay-style", "WSD", "--lr-wsd-decay-style", "cosine", "--lr-wsd-decay-iters", f"{STEPS - START}"),
    *("--weight-decay", "0.1", "--adam-beta2", "0.95", "--eval-iters", "16", "--log-interval", "50"),
)
_LOSS = re.compile(r"on validation set \| lm loss value: (\S+)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopRuns]:
    yield from loop_runs(tmp_path_factory.mktemp("megatron_lm_gain"))


def _run(
    runs: LoopRuns, corpus: Path, seed: int, name: str, strategy: str, shares: Mapping[str, float], *more: str
) -> Outcome:
    blend = [word for domain, share in shares.items() for word in (f"{share:.6f}", f"{corpus}/candidates/{domain}")]
    vocabulary = f"{manifest.read(corpus).tokenizer['vocab_size']}"
    opus: dict[str, Any] = {
        "selection": {"strategy": strategy, "score_length": 64, "score_micro_batch_size": 16},
        "proxy": {"prefix": f"{corpus}/proxy/prose"},
    }
    return runs.run(
        f"{name}{seed}",
        *(*SETTINGS, "--seed", f"{seed}", "--vocab-size", vocabulary, *more),
        opus=opus,
        data=("--train-data-path", *blend, "--valid-data-path", f"{corpus}/validation/prose"),
        length=("--train-iters", f"{STEPS}"),
        batch=("--global-batch-size", f"{K}"),
    )


def test_opus_lowers_the_loss_of_the_target(request: pytest.FixtureRequest, runs: LoopRuns, tmp_path: Path) -> None:
    """Guards against a hook that selects, but not by the target, which is prose."""
    if not request.config.getoption("--experiments"):
        pytest.skip("nine runs of 200 steps: --experiments")
    corpus = prepare_lab("noisy", tmp_path, indexed)
    losses: dict[str, list[float]] = {"random": [], "opus": [], "shares": []}
    for seed in SEEDS:
        start = _run(runs, corpus, seed, "start", "random", SHARES, "--exit-interval", f"{START}")
        shares: dict[str, dict[str, float]] = {"shares": {}}
        for arm, found in losses.items():
            strategy, blend = ("opus" if arm == "opus" else "random"), SHARES if arm != "shares" else shares["opus"]
            outcome = _run(runs, corpus, seed, arm, strategy, blend, "--load", str(start.folder))
            found.append(float(_LOSS.findall(outcome.log)[-1]))
            rows = [row for row in outcome.metrics() if row["step"] >= START]
            assert len(rows) == STEPS - START
            shares[arm] = {name: float(np.mean([row["selected_share"][name] for row in rows])) for name in SHARES}
            choosing, seconds = (sum(row[name] for row in rows) for name in ("choose_seconds", "step_seconds"))
            chosen = ", ".join(f"{name} {share:.3f}" for name, share in shares[arm].items())
            print(
                f"seed {seed} {arm}: loss {found[-1]:.4f}; chosen: {chosen}; "
                f"{seconds:.0f} s, of which choosing {choosing / seconds:.2f}",
                flush=True,
            )
        assert shares["opus"]["prose"] > shares["random"]["prose"]
        assert shares["opus"]["noise"] < shares["random"]["noise"]
    for one, other in (("opus", "random"), ("shares", "random"), ("opus", "shares")):
        difference = np.array(losses[one]) - np.array(losses[other])
        interval = 4.303 * difference.std(ddof=1) / np.sqrt(len(SEEDS))  # Student's t, 95%, 2 degrees of freedom
        print(f"{one} - {other}: {difference.mean():+.4f} +- {interval:.4f} ({difference})")
    assert all(opus < random for opus, random in zip(losses["opus"], losses["random"], strict=True))
