"""What stays through one hooked run: the settings, Megatron's datasets, and the selection once it can be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_opus.backends.engines.megatron import training_loop
from megatron_opus.backends.formats.torch_files import load_plain
from megatron_opus.config import ConfigError
from megatron_opus.files import atomic_file
from megatron_opus.integrations.megatron_lm.run import FOLDER, SelectionRun
from megatron_opus.integrations.megatron_lm.samples import Samples, SelectedMicroBatches
from megatron_opus.integrations.megatron_lm.settings import HookConfig


class Selector:
    """Takes what Megatron-LM's loop makes, in the order in which it makes it: checkpoint, datasets, loaders, steps."""

    def __init__(self, config: HookConfig) -> None:
        self.config = config
        self.run: SelectionRun | None = None  # from the first training step on
        self._samples: Samples | None = None
        self._train: list[Any] = []  # the train dataset, one for each virtual stage
        self._iterator: SelectedMicroBatches | None = None
        self._saved: dict[str, Any] | None = None  # what the loaded checkpoint holds for us

    def train_samples(self, asked: int, steps: int) -> int:
        """Return how many train samples Megatron is asked for: what K of N needs, and no more where rho is 1."""
        rho, ratio = self.config.selection.rho, self.config.selection.prefilter.pool_ratio
        candidates = asked if rho == 1 else int(asked / rho) + steps  # N is rounded in every step
        return candidates * ratio

    def take(self, train: Any, valid: Any) -> None:
        """Take Megatron's datasets; each virtual stage has its own, all alike. Collective."""
        if train is None:
            raise ConfigError(
                "the train dataset: expected one on every rank, got none; build it with Megatron's "
                "BlendedMegatronDatasetBuilder in a provider whose is_distributed is True"
            )
        self._train.append(train)
        if self._samples is None:
            prefix = self.config.proxy.prefix
            self._samples = Samples(train, valid if prefix is None else training_loop.indexed_dataset(prefix, train))

    def is_train(self, dataset: Any) -> bool:
        return any(dataset is train for train in self._train)

    def iterator(self) -> Any:
        """Return what Megatron takes for its train data loader: one view of the same batches for each virtual stage."""
        return self._batches().view()

    def before(self, arguments: Any, forward_step: Any, model: Any, optimizer: Any) -> Any:
        """Choose the sequences of the coming step; returns the forward step that training is to use. Collective."""
        if self.run is None:
            assert self._samples is not None
            self.run = SelectionRun(
                self.config, arguments, self._samples, self._batches(), forward_step, model, optimizer, self._saved
            )
        return self.run.before(forward_step)

    def after(self, result: tuple[Any, ...], rate: float, events: Any) -> None:
        """Record a step by what Megatron's `train_step` has returned."""
        assert self.run is not None
        self.run.after(result, rate, events)

    def evaluated(self, losses: dict[str, Any]) -> None:
        """Keep the validation losses of an evaluation, which the last pipeline stage alone knows."""
        if self.run is not None and losses:
            self.run.evaluated({name: float(value) for name, value in losses.items()})

    def save(self, folder: str, iteration: int) -> None:
        """Write our state beside the checkpoint of `iteration`, before Megatron's tracker names it. Collective."""
        if self.run is None:
            return
        state = self.run.state()
        if dist.get_rank() == 0:
            path = state_file(folder, iteration)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as stream:
                torch.save(state, stream)

    def loaded(self, folder: str | None, iteration: int) -> None:
        """Look for our state beside the checkpoint that Megatron has loaded. Raises CheckpointError for a bad file."""
        path = None if folder is None or not iteration else state_file(folder, iteration)
        if path is not None and path.exists():
            self._saved = load_plain(path)

    def close(self) -> None:
        if self.run is not None:
            self.run.close()

    def _batches(self) -> SelectedMicroBatches:
        if self._iterator is None:
            groups = training_loop.loop_groups()
            self._iterator = SelectedMicroBatches(dp_rank=groups.dp_rank, dp_size=groups.dp_size)
        return self._iterator


def state_file(folder: str, iteration: int) -> Path:
    """Name the file that lies beside Megatron's checkpoint of one iteration."""
    return Path(folder) / FOLDER / f"iter_{iteration:07d}.pt"
