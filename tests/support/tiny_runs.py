"""Whole runs of a very small model on the embedded corpus, for tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_opus.config import RunConfig, from_dict

STEPS = 22


def recipe(cache: Path, output: Path, name: str, **sections: dict[str, Any]) -> RunConfig:
    """A model of two small layers on the embedded corpus."""
    raw: dict[str, Any] = {
        "name": name,
        "output_dir": str(output),
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
        "data": {"cache_dir": str(cache), "seq_length": 32},
        "optimizer": {"lr": 3e-3, "lr_warmup_steps": 1},
        "parallel": {"zero_stage": 0},
        "training": {
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "train_steps": STEPS,
            "eval_interval": 0,
            "eval_sequences": 4,
            "checkpoint_interval": 0,
            "tensorboard": False,
        },
        "selection": {"proxy_batch_size": 4, "score_length": 32, "debug_checks": True},
    }
    for section, values in sections.items():
        raw[section] = {**raw[section], **values}
    return from_dict(raw)


def run(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """The whole run on this rank, through the same Session that the launch scripts start."""
    from megatron_opus.runs.ledger import read_ledger
    from megatron_opus.runs.metrics import read_metrics
    from megatron_opus.training.session import Session

    said: list[str] = []
    session = Session(config, resume=resume, versions={}, say=said.append)
    session.train()
    rows = read_metrics(session.run_dir)
    ledger = read_ledger(session.run_dir / "ledger")
    weights = torch.cat([p.detach().float().flatten() for p in session.engine.module.parameters()])
    return {
        "losses": [row["loss"] for row in rows],
        "rows": rows,
        "ids": ledger["sample_id"].to_pylist(),
        "selected": ledger["selected"].to_pylist(),
        "order": ledger["draw_order"].to_pylist(),
        "alignment": torch.from_numpy(ledger["alignment"].to_numpy()),
        "weights": weights,
        "driver": session.driver.counters,
        "said": said,
    }
