"""Run folders for tests of the report, made with the writers that a run uses, from choices written down here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_opus import config as configs
from megatron_opus.backends.formats import indexed
from megatron_opus.config import RunConfig
from megatron_opus.data.corpus import Corpus
from megatron_opus.data.prepare.pipeline import prepare
from megatron_opus.data.prepare.resolve import DatasetSpec, PrepareConfig, holdout
from megatron_opus.runs.checkpoints import FORMAT
from megatron_opus.runs.ledger import LedgerWriter
from megatron_opus.training.metrics import MetricsWriter
from megatron_opus.types import Candidates, Selection, Signals

N, K, LENGTH, STEPS = 8, 4, 16, 12
DOMAINS = ("web", "code")
NASTY = "</pre><script>alert(1)</script><img src=http://example.org/x.png onerror=alert(2)> &amp; \u202e"


def make_corpus(root: Path) -> Path:
    """Two candidate domains, and a target `goal`; every document of `web` is what a page must not obey."""
    texts = {
        "web": [f"{NASTY} page {i} " + "some words of it " * (3 + i % 5) for i in range(40)],
        "code": [f"def function_{i}(x): return x + {i} " * (2 + i % 4) for i in range(40)],
        "goal": [f"the goal has number {i} and says so " * 3 for i in range(40)],
    }
    for name, documents in texts.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    specs = [DatasetSpec(name=d, role="candidates", sources=(str(root / f"{d}.jsonl"),)) for d in DOMAINS]
    prepare(
        PrepareConfig(
            output=root / "corpus",
            tokenizer="train-sentencepiece",
            vocab_size=340,
            datasets=(*specs, *holdout("goal", (str(root / "goal.jsonl"),), 0.3)),
            progress=False,
        ),
        indexed,
        lambda _: None,
    )
    return root / "corpus"


def run_config(directory: Path, corpus: Path, strategy: str = "opus", steps: int = STEPS) -> RunConfig:
    return configs.from_dict(
        {
            "name": directory.name,
            "output_dir": str(directory.parent),
            "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1},
            "data": {"path": str(corpus), "seq_length": LENGTH},
            "training": {"global_batch_size": K, "train_steps": steps, "micro_batch_size": 1},
            "selection": {"strategy": strategy, "rho": K / N},
        }
    )


def decide(corpus: Corpus, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids, domains, utility, chosen positions) of a step: the K largest utilities are chosen."""
    generator = np.random.default_rng(step)
    first, count = corpus.first_ids("candidates"), corpus.sequences("candidates")
    domains = generator.integers(0, len(DOMAINS), N)
    ids = first[domains] + generator.permutation(int(count.min()))[:N]
    utility = generator.normal(size=N) * 10.0 ** -(step % 3) + domains
    return ids, domains.astype(np.int32), utility, np.argsort(-utility)[:K]


def row(step: int, domains: np.ndarray, chosen: np.ndarray, offset: float = 0.0) -> dict[str, Any]:
    """What the loop writes, of the names that the report knows."""
    share = {name: float(np.mean(domains[chosen] == d)) for d, name in enumerate(DOMAINS)}
    found: dict[str, Any] = {
        "step": step,
        "loss": 5.0 - 0.1 * step + offset,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "skipped": step == 5,
        "update_tokens": (step + 1) * K * LENGTH,
        "candidate_tokens": (step + 1) * N * LENGTH,
        "entropy_ratio": 0.8,
        "excluded": 1.0,
        "fallbacks": step // 6,
        "excluded_total": step + 1,
        "geometry": "adamw-separable",
        "selected_share": share,
        "score_seconds": 0.25,
        "choose_seconds": 0.3,
        "score_bytes_sent": 0,
        "step_seconds": 1.0 + 0.5 * (step % 2),
        "memory_bytes": 2**30,
    }
    if (step + 1) % 4 == 0:
        found["validation_loss"] = {"goal": 4.0 - 0.2 * step + offset, "other": 3.0 + offset}
    return found


def write_run(
    directory: Path,
    corpus_dir: Path,
    *,
    strategy: str = "opus",
    steps: int = STEPS,
    offset: float = 0.0,
    scored: bool = True,
    changes: Mapping[int, Mapping[str, Any]] | None = None,
    planned: int | None = None,
) -> Corpus:
    """A finished run with a checkpoint's marker. `changes`: step -> what its row of metrics says otherwise."""
    config = run_config(directory, corpus_dir, strategy, planned or steps)
    corpus = Corpus.open(corpus_dir, config.data, indexed.open_documents)
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(configs.dump(config))
    metrics = MetricsWriter(directory, first_step=0, tensorboard=False)
    ledger = LedgerWriter(directory / "ledger", DOMAINS)
    for step in range(steps):
        ids, domains, utility, chosen = decide(corpus, step)
        metrics.write({**row(step, domains, chosen, offset), **(changes or {}).get(step, {})})
        values = torch.from_numpy(utility)
        finite = torch.ones(N, dtype=torch.bool)
        finite[int(np.argmin(utility))] = False
        ledger.append(
            Candidates(step=step, sample_ids=ids, domains=domains),
            Signals(alignment=values, finite=finite) if scored else Signals(),
            Selection(indices=torch.from_numpy(chosen.copy()), utility=values, redundancy=values / 10)
            if scored
            else Selection(indices=torch.from_numpy(chosen.copy())),
        )
        if step % 5 == 4:
            ledger.flush()
    ledger.flush()
    metrics.close()
    mark(directory, corpus.fingerprint)
    return corpus


def mark(directory: Path, fingerprint: str) -> None:
    """The marker that a complete checkpoint has, without the checkpoint."""
    folder = directory / "checkpoints/step_00000012"
    folder.mkdir(parents=True, exist_ok=True)
    marker = {
        "format": FORMAT,
        "step": 12,
        "config": {},
        "files": {},
        "fingerprints": {"data": fingerprint},
        "layout": {"world_size": 2, "tensor_model_parallel_size": 1},
        "versions": {"torch": "9.9.9"},
        "environment": {"device": "an abacus", "NVTE_FLASH_ATTN": "absent"},
    }
    (folder / "complete.json").write_text(json.dumps(marker))
