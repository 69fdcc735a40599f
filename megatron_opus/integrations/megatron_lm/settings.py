"""`opus.yaml`: selection and target. Everything else is read from Megatron-LM's own arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opus.config import ConfigError, RunConfig, SelectionConfig
from megatron_opus.config.checks import check_mechanisms
from megatron_opus.config.data import DataConfig
from megatron_opus.config.load import without_removed
from megatron_opus.config.recipe import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_opus.config.schema import Section, build
from megatron_opus.config.text import read_yaml


@dataclass(frozen=True, kw_only=True)
class ProxyConfig(Section, at="proxy"):
    """The target whose loss the selection is to lower."""

    # An indexed dataset, without .bin / .idx, tokenized as the training data. null: Megatron's validation data.
    prefix: str | None = None


@dataclass(frozen=True, kw_only=True)
class HookConfig(Section):
    """A whole opus.yaml."""

    selection: SelectionConfig = field(default_factory=SelectionConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    # Where ledger and metrics are written. null: the folder `opus` in --save; without --save, nowhere.
    output_dir: str | None = None


def load(path: str | Path) -> HookConfig:
    """Read opus.yaml. Raises ConfigError naming the key, what was expected and what was found."""
    try:
        config: HookConfig = build(HookConfig, without_removed(read_yaml(Path(path))))
        _check(config.selection)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from None
    return config


def _check(selection: SelectionConfig) -> None:
    check_mechanisms(selection)
    if selection.strategy == "filter_then_weight":
        raise ConfigError(
            "selection.strategy: expected one that gives no weights to losses, got filter_then_weight; Megatron-LM "
            "divides the loss of each micro-batch by the sum of its mask, which takes such weights out again: use opus"
        )
    if selection.scope != "global":
        raise ConfigError(f"selection.scope: expected global under Megatron-LM's loop, got {selection.scope}")


def recipe(arguments: Any, config: HookConfig) -> RunConfig:
    """Describe a Megatron-LM run as a recipe of ours, from its arguments, for the driver and for the report."""
    a = arguments
    tokens = a.seq_length
    return RunConfig(
        name="opus",
        output_dir=str(Path(config.output_dir or a.save or ".")),
        seed=a.seed,
        model=ModelConfig(
            num_layers=a.num_layers,
            hidden_size=a.hidden_size,
            num_attention_heads=a.num_attention_heads,
            ffn_hidden_size=a.ffn_hidden_size,
            vocab_size=a.padded_vocab_size,
            max_position_embeddings=max(tokens, a.max_position_embeddings or tokens),
            swiglu=bool(a.swiglu),
            untie_embeddings_and_output_weights=bool(a.untie_embeddings_and_output_weights),
        ),
        data=DataConfig(path="the datasets of Megatron-LM's own arguments", seq_length=tokens),
        parallel=ParallelConfig(
            engine="megatron",
            tensor_model_parallel_size=a.tensor_model_parallel_size,
            pipeline_model_parallel_size=a.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=a.virtual_pipeline_model_parallel_size,
            sequence_parallel=bool(a.sequence_parallel),
            use_distributed_optimizer=bool(a.use_distributed_optimizer),
            overlap_grad_reduce=bool(a.overlap_grad_reduce),
            overlap_param_gather=bool(a.overlap_param_gather),
        ),
        optimizer=OptimizerConfig(
            name="sgd" if a.optimizer == "sgd" else "muon" if "muon" in a.optimizer else "adamw",
            lr=a.lr,
            min_lr=a.min_lr or 0.0,
        ),
        training=TrainingConfig(
            micro_batch_size=a.micro_batch_size,
            global_batch_size=a.global_batch_size,
            train_steps=a.train_iters,
            precision="bf16" if a.bf16 else "fp32",
        ),
        selection=config.selection,
    )
