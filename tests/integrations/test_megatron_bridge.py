"""The contract with Megatron-Bridge, on a CPU: its callback manager, its provider protocol and its samplers.

MEGATRON_BRIDGE=<folder into which the wheel of megatron-bridge 0.6 was unpacked> runs this. Bridge itself needs a GPU
and dozens of packages: its training loop is not imported; the test fires its events in the order in which it does.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import DistributedPool
from torch import Tensor

from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics

BRIDGE = os.environ.get("MEGATRON_BRIDGE", "")
LENGTH, VOCABULARY, K, STEPS = 16, 64, 4, 3  # LENGTH is that of gpt_runs.recipe


class Tokens(torch.utils.data.Dataset[Any]):
    """A dataset of Megatron's kind: random tokens, the same for one index on every rank."""

    dataset_path = None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = torch.from_numpy(np.random.default_rng(index).integers(0, VOCABULARY, LENGTH + 1))
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(LENGTH),
            "position_ids": torch.arange(LENGTH),
        }


def load_bridge(folder: Path) -> None:
    """Make the parts of the wheel importable that need neither a GPU nor its other packages."""
    for name in ("megatron.bridge", "megatron.bridge.data", "megatron.bridge.training.tokenizers"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    named: Any = ModuleType("megatron.bridge.training.tokenizers.tokenizer")
    named.MegatronTokenizer = object  # for annotations alone
    sys.modules[named.__name__] = named
    utils: Any = ModuleType("megatron.bridge.data.utils")
    utils.get_dataset_provider = lambda config: lambda samples, config: [Tokens(n) if n else None for n in samples]
    sys.modules[utils.__name__] = utils


def bridge_run(folder: str, out: str) -> tuple[list[list[int]], list[int]]:
    """Train as Bridge's loop does on this rank; (tokens' first column of each step, validation batches' sizes)."""
    from gpt_runs import recipe

    load_bridge(Path(folder))
    callbacks = importlib.import_module("megatron.bridge.training.callbacks")
    base = importlib.import_module("megatron.bridge.data.base")
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_opus.backends.engines.megatron.pipeline import run_schedule
    from megatron_opus.backends.model import cpu_shims
    from megatron_opus.backends.model.build import build_model
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.config import SelectionConfig
    from megatron_opus.integrations.megatron_bridge import OpusCallback
    from megatron_opus.integrations.megatron_lm.settings import HookConfig

    config = recipe()
    groups = init_parallel(config.parallel, seed=1)
    model = build_model(config)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    with cpu_shims.cuda_names():
        wrapped = DistributedDataParallel(model.config, ddp, model)
        settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True)
        optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
    model.config.finalize_model_grads_func = finalize_model_grads
    init_num_microbatches_calculator(dist.get_rank(), None, K, 1, groups.dp_size)
    plain = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "seq_length": LENGTH}
    cfg = SimpleNamespace(
        model=SimpleNamespace(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=VOCABULARY, **plain),
        optimizer=settings,
        ddp=ddp,
        train=SimpleNamespace(micro_batch_size=1, global_batch_size=K, train_iters=STEPS),
        validation=SimpleNamespace(eval_micro_batch_size=None),
        checkpoint=SimpleNamespace(save=out, load=None, save_interval=2),
        rng=SimpleNamespace(seed=1),
        rerun_state_machine=SimpleNamespace(rerun_mode="disabled"),
        dataset=base.DataloaderConfig(
            dataloader_type="single", num_workers=0, persistent_workers=False, pin_memory=False
        ),
    )
    cfg.dataset.seq_length = LENGTH

    def forward_step(state: Any, batches: Any, piece: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        losses = piece(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, None

    selection = SelectionConfig(proxy_batch_size=2, score_micro_batch_size=2)
    opus = OpusCallback(HookConfig(selection=selection), forward_step)
    cfg.dataset = opus.datasets(cfg)
    assert isinstance(cfg.dataset, base.DatasetProvider)
    cfg.dataset.finalize()
    pg = SimpleNamespace(dp=groups.dp or dist.group.WORLD)
    context = base.DatasetBuildContext(train_samples=K * STEPS, valid_samples=6, test_samples=0, pg_collection=pg)
    train, valid, _ = cfg.dataset.build_datasets(context)
    manager = callbacks.normalize_callbacks([opus])
    state = SimpleNamespace(
        cfg=cfg, train_state=SimpleNamespace(step=0, consumed_train_samples=0), tensorboard_logger=None
    )
    seen: list[list[int]] = []

    def fire(event: str, **more: Any) -> None:
        assert callbacks.should_fire(manager, event)
        manager.fire(event, callbacks.CallbackContext(state=state, model=[wrapped], optimizer=optimizer, **more))

    for _ in range(STEPS):
        fire("on_train_step_start")
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        seen.append([])

        def forward(piece: Any, index: int) -> tuple[Tensor, Any]:
            batch = next(train)
            seen[-1].append(int(batch["tokens"][0, 0]))
            losses = piece(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
            return losses, lambda found: found.mean()

        run_schedule([wrapped], K // groups.dp_size, forward, size=1, length=LENGTH)
        with cpu_shims.cuda_names():
            _, norm, _ = optimizer.step()
        fire("on_train_step_end", loss_dict={"lm loss": torch.tensor(1.0)}, grad_norm=norm, skipped_iter=False)
        state.train_state.step += 1
        state.train_state.consumed_train_samples += K
    fire("on_eval_end", total_loss_dict={"lm loss": torch.tensor(2.0)})
    fire("on_checkpoint_save")
    fire("on_train_end")
    return seen, [len(next(valid)["tokens"]) for _ in range(5)]


@pytest.mark.skipif(not BRIDGE, reason="MEGATRON_BRIDGE names no unpacked wheel of megatron-bridge")
def test_events_of_bridge_select_and_record(world2: DistributedPool, tmp_path: Path) -> None:
    """Guards against methods that Bridge does not find, an iterator that is not filled, and state that is not saved."""
    (first, valid), (second, _) = world2.run(bridge_run, BRIDGE, str(tmp_path))
    assert valid == [1, 1, 1, 1, 1]  # 3 samples a rank, and again from the first
    table = read_ledger(tmp_path / "opus" / "ledger")
    for step in range(STEPS):
        rows = table.filter(np.asarray(table["step"]) == step)
        chosen = rows.filter(rows["selected"])["sample_id"].to_pylist()
        assert len(rows) == 2 * K
        # micro-batch, rank, row: rank 0 has the first and the third of the chosen
        assert first[step] == [int(Tokens(99)[i]["tokens"][0]) for i in chosen[::2]]
        assert second[step] == [int(Tokens(99)[i]["tokens"][0]) for i in chosen[1::2]]
    rows = read_metrics(tmp_path / "opus")
    assert [row["loss"] for row in rows] == [1.0, 1.0, 1.0]
    assert rows[-1]["validation_loss"] == {"lm loss": 2.0}
    assert {path.name for path in (tmp_path / "opus").glob("*.pt")} == {"iter_0000002.pt", "iter_0000003.pt"}
