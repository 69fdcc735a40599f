"""OPUS in Megatron-Bridge's `pretrain(cfg, forward_step, callbacks=[...])`: a callback, and a dataset provider.

    opus = OpusCallback("opus.yaml", forward_step)
    cfg.dataset = opus.datasets(cfg)
    pretrain(cfg, forward_step, callbacks=[opus])

The callback chooses before each step; the provider's train iterator hands out what was chosen. Written for
Megatron-Bridge 0.6, whose callbacks get the model, the optimizer and the state, but neither the forward step nor the
data iterator: the two lines above give them.
"""

from __future__ import annotations

import functools
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opus.config import ConfigError
from megatron_opus.integrations.megatron_lm import settings
from megatron_opus.integrations.megatron_lm.checks import check_arguments
from megatron_opus.integrations.megatron_lm.run import current_rate
from megatron_opus.integrations.megatron_lm.selector import Selector
from megatron_opus.integrations.megatron_lm.settings import HookConfig


class OpusCallback:
    """Selects the training data of one `pretrain()`. Bridge finds the methods below by their names."""

    def __init__(self, config: HookConfig | str | Path, forward_step: Callable[..., Any]) -> None:
        """`config` is an opus.yaml or what was read from one; `forward_step` is the one that `pretrain` is given."""
        self._selector = Selector(config if isinstance(config, HookConfig) else settings.load(config))
        self._forward_step = forward_step
        self._rate = 0.0
        self._saved_at = -1

    def datasets(self, cfg: Any) -> Any:
        """Return what takes the place of `cfg.dataset`: the same datasets, of which the train data is selected.

        Raises ConfigError for settings of the loop that selection does not go with.
        """
        return _provider(self._selector, cfg)

    def on_train_step_start(self, context: Any) -> None:
        """Choose the sequences of the coming step. Collective."""
        state = context.state
        if self._selector.run is None:
            self._begin(state)
        forward = functools.partial(self._forward_step, state)
        if self._selector.before(self._arguments, forward, context.model, context.optimizer) is not forward:
            raise ConfigError(
                "selection.ado: expected a strategy that learns nothing from losses of sequences, which a callback of "
                "Megatron-Bridge has no place to read; set selection.ado.enabled=false"
            )
        self._rate = current_rate(context.optimizer)

    def on_train_step_end(self, context: Any) -> None:
        """Record the step, and write our state where a checkpoint of this step follows. Collective."""
        skipped, norm = bool(context.skipped_iter), context.grad_norm
        result = (context.loss_dict or {}, skipped, False, False, 0, norm)
        writer = getattr(context.state, "tensorboard_logger", None)
        self._selector.after(result, self._rate, writer)
        interval, completed = context.state.cfg.checkpoint.save_interval, self._completed
        if interval and completed % interval == 0:
            self._save(context.state.cfg.checkpoint.save, completed)

    def on_eval_end(self, context: Any) -> None:
        """Keep the validation losses of an evaluation."""
        self._selector.evaluated(context.total_loss_dict or {})

    def on_checkpoint_save(self, context: Any) -> None:
        """Write our state for a checkpoint that no interval announced: before an exit, or at a ramp-up."""
        if self._selector.run is not None:
            self._save(context.state.cfg.checkpoint.save, self._completed)

    def on_train_end(self, context: Any) -> None:
        """Put what was recorded on the disk."""
        self._selector.close()

    @property
    def _completed(self) -> int:
        assert self._selector.run is not None
        return self._selector.run.completed

    def _save(self, folder: str | None, completed: int) -> None:
        if folder and completed != self._saved_at:
            self._saved_at = completed
            self._selector.save(folder, completed)

    def _begin(self, state: Any) -> None:
        self._arguments = arguments_of(state)
        check_arguments(self._arguments, self._selector.config.selection)
        checkpoint = state.cfg.checkpoint
        self._selector.loaded(checkpoint.load or checkpoint.save, self._arguments.iteration)


def arguments_of(state: Any) -> Namespace:
    """Say what Megatron-LM's arguments would say of a Bridge run, from its GlobalState."""
    cfg = state.cfg
    model, optimizer, ddp, train = cfg.model, cfg.optimizer, cfg.ddp, cfg.train
    mode = getattr(cfg.rerun_state_machine, "rerun_mode", "disabled")
    if mode != "disabled":
        raise ConfigError(f"rerun_state_machine.rerun_mode: expected disabled with OpusCallback, got {mode}")

    def of_model(name: str, default: Any = None) -> Any:
        return getattr(model, name, default)

    return Namespace(
        save=cfg.checkpoint.save,
        seed=cfg.rng.seed,
        iteration=state.train_state.step,
        consumed_train_samples=state.train_state.consumed_train_samples,
        rerun_mode=mode,
        seq_length=model.seq_length,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        train_iters=train.train_iters,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=of_model("ffn_hidden_size"),
        padded_vocab_size=of_model("vocab_size"),
        max_position_embeddings=model.seq_length,
        swiglu=bool(of_model("gated_linear_unit")),
        untie_embeddings_and_output_weights=not of_model("share_embeddings_and_output_weights", True),
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=of_model("virtual_pipeline_model_parallel_size"),
        context_parallel_size=of_model("context_parallel_size", 1),
        sequence_parallel=bool(of_model("sequence_parallel")),
        num_experts=of_model("num_moe_experts"),
        mtp_num_layers=of_model("mtp_num_layers"),
        cuda_graph_impl=of_model("cuda_graph_impl", "none"),
        transformer_impl="local",  # layers of Transformer Engine are found, or refused, when layers are looked for
        fp8=of_model("fp8"),
        fp16=bool(of_model("fp16")),
        bf16=bool(of_model("bf16")),
        optimizer=optimizer.optimizer,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        use_precision_aware_optimizer=bool(getattr(optimizer, "use_precision_aware_optimizer", False)),
        optimizer_cpu_offload=bool(getattr(optimizer, "optimizer_cpu_offload", False)),
        use_distributed_optimizer=bool(ddp.use_distributed_optimizer),
        overlap_grad_reduce=bool(ddp.overlap_grad_reduce),
        overlap_param_gather=bool(ddp.overlap_param_gather),
        use_megatron_fsdp=bool(getattr(ddp, "use_megatron_fsdp", False)),
        num_distributed_optimizer_instances=getattr(ddp, "num_distributed_optimizer_instances", 1),
        iterations_to_skip=getattr(train, "iterations_to_skip", None),
    )


def _provider(selector: Selector, cfg: Any) -> Any:
    """Wrap `cfg.dataset`. Bridge takes the iterators of an `external` provider as they are, for all three splits."""
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.data.samplers import build_pretraining_data_loader
    from megatron.bridge.data.utils import get_dataset_provider

    inner, train = cfg.dataset, cfg.train
    if inner.dataloader_type not in ("single", None):
        raise ConfigError(
            f"dataset.dataloader_type: expected single, got {inner.dataloader_type}; candidates are offered in the "
            "order of the dataset"
        )

    def evaluated(dataset: Any, group: Any) -> Iterator[Any] | None:
        if dataset is None:
            return None
        loader = build_pretraining_data_loader(
            dataset,
            0,
            "single",
            cfg.validation.eval_micro_batch_size or train.micro_batch_size,
            inner.num_workers,
            inner.data_sharding,
            pin_memory=inner.pin_memory,
            persistent_workers=inner.persistent_workers,
            data_parallel_rank=group.rank(),
            data_parallel_size=group.size(),
        )

        def again() -> Iterator[Any]:
            while True:
                yield from loader

        return again()

    @dataclass(kw_only=True)
    class SelectedDatasets(DatasetProvider):  # type: ignore[misc,unused-ignore]
        dataloader_type: str = "external"
        seq_length: int = 0

        def build_datasets(self, context: Any) -> tuple[Any, Any, Any]:
            asked = selector.train_samples(context.train_samples, train.train_iters)
            samples = [asked, context.valid_samples, context.test_samples]
            if hasattr(inner, "tokenizer"):  # as Bridge's setup does with the dataset of its own configuration
                inner.tokenizer = context.tokenizer
            build = get_dataset_provider(inner)
            given = {"tokenizer": context.tokenizer, "pg_collection": context.pg_collection}
            takes = inspect.signature(build).parameters
            found = build(samples, inner, **{name: value for name, value in given.items() if name in takes})
            selector.take(found[0], found[1])
            group = context.pg_collection.dp
            return selector.iterator(), evaluated(found[1], group), evaluated(found[2], group)

        def finalize(self) -> None:
            super().finalize()
            inner.finalize()

    return SelectedDatasets(
        num_workers=inner.num_workers,
        data_sharding=inner.data_sharding,
        pin_memory=inner.pin_memory,
        persistent_workers=inner.persistent_workers,
        seq_length=inner.seq_length,
    )
