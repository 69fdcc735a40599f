"""What a scoring pass takes from Megatron-LM's own training loop: its model, its forward step, its optimizer.

The user's `forward_step(data_iterator, model)` does the forward pass of scoring. He reads his batch, calls his model
and slices his context as in training; he is given a scoring micro-batch in place of one of training.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.package_info import __version__ as megatron_version
from torch import Tensor, nn

from megatron_opus.backends.engines.base import of_all_ranks
from megatron_opus.backends.engines.megatron.ddp import WholeRunner, gathered
from megatron_opus.backends.engines.megatron.distributed_optimizer import MegatronState
from megatron_opus.backends.engines.megatron.pipeline import ScheduleRunner
from megatron_opus.backends.model.parallel import megatron_groups
from megatron_opus.backends.model.scored_layers import megatron_layers
from megatron_opus.config import ConfigError, SelectionConfig
from megatron_opus.types import Batch, Groups, MicrobatchRunner, OptimizerState, ScoredLayer

ForwardStep = Callable[..., tuple[Tensor, Any]]
__all__ = ["megatron_version"]


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """Holds what scoring needs of a training loop that is not ours."""

    runner: MicrobatchRunner
    layers: Sequence[ScoredLayer]
    state: OptimizerState
    device: torch.device


def loop_parts(
    model: Sequence[Any],
    optimizer: Any,
    forward_step: ForwardStep,
    arguments: Any,
    selection: SelectionConfig,
    groups: Groups,
    completed_steps: Callable[[], int],
) -> LoopParts:
    """Take a running loop apart. Collective.

    `model` is the list of wrapped pieces that Megatron's `train_step` is given, `arguments` its global arguments.
    Raises ConfigError where nothing can be scored, UnsupportedOptimizer for an optimizer whose step is not known.
    """
    pieces = [_bare(piece) for piece in model]
    whole = nn.ModuleList(pieces) if len(pieces) > 1 else pieces[0]
    layers = megatron_layers(whole, None, selection)
    device = next(whole.parameters()).device
    forward = UserForward(forward_step, arguments, groups)

    def quiet() -> contextlib.AbstractContextManager[None]:
        return gathered(model)

    runner: MicrobatchRunner = (
        WholeRunner(pieces[0], forward, device, quiet)
        if groups.pp is None
        else ScheduleRunner(pieces, device, quiet, forward)
    )
    return LoopParts(
        runner=runner, layers=layers, state=MegatronState(optimizer, groups, completed_steps), device=device
    )


class UserForward:
    """Runs the user's own forward step on a batch of ours: (piece of the model, batch) -> what the piece gives.

    That is the unreduced losses [b, T] on the last pipeline stage. His loss function, which would average, is not
    called. With context parallelism T are this rank's tokens, which he cuts out of whole sequences: he is given those.
    """

    def __init__(self, forward_step: ForwardStep, arguments: Any, groups: Groups) -> None:
        """`arguments` are Megatron's: he takes the shape of a batch from them, so they say ours while he runs."""
        self._forward_step, self._arguments, self._groups = forward_step, arguments, groups

    def __call__(self, piece: Any, batch: Batch) -> Tensor:
        arguments = self._arguments
        kept = arguments.seq_length, arguments.micro_batch_size
        whole = batch.map(lambda x: _whole(x, self._groups))
        arguments.micro_batch_size, arguments.seq_length = whole.tokens.shape
        try:
            output = self._forward_step(iter([self._keys(whole)]), piece)[0]
        finally:
            arguments.seq_length, arguments.micro_batch_size = kept
        if getattr(piece, "post_process", True) and output.shape != batch.tokens.shape:
            raise ConfigError(
                f"forward_step: expected the model's unreduced losses of shape {list(batch.tokens.shape)} as its first "
                f"result, got {list(output.shape)}; average them in the loss function that it returns"
            )
        return output

    def _keys(self, batch: Batch) -> dict[str, Tensor]:
        found = {name: getattr(batch, name) for name in ("tokens", "labels", "loss_mask", "position_ids")}
        if batch.document_ids is not None:
            found["attention_mask"] = ~attended(batch.document_ids)
        return found


def _own(x: Tensor, groups: Groups) -> Tensor:
    """Cut this context-parallel rank's tokens out of [b, L]: of 2 x cp chunks, rank r has numbers r and -1 - r."""
    if groups.cp is None:
        return x
    chunks = x.chunk(2 * groups.cp_size, dim=1)
    return torch.cat([chunks[groups.cp_rank], chunks[-1 - groups.cp_rank]], dim=1)


def _whole(x: Tensor, groups: Groups) -> Tensor:
    """Put the tokens [b, L / cp] of all context-parallel ranks together to [b, L], as they were before `_own`."""
    if groups.cp is None:
        return x
    parts = [torch.empty_like(x) for _ in range(groups.cp_size)]
    dist.all_gather(parts, x.contiguous(), group=groups.cp)
    first, second = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
    return torch.cat([*first, *reversed(second)], dim=1)


def attended(document_ids: Tensor) -> Tensor:
    """Turn document ids [b, L] into [b, 1, L, L] bool: True where row t may look at column u <= t of its document."""
    same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
    return same.tril().unsqueeze(1)


def document_ids_of(attention_mask: Tensor) -> Tensor:
    """Read document ids [b, L] int32 off Megatron's masks [b, 1, L, L], which are True where attention is barred.

    A document begins at a token that may not look at the one before it. Example for three tokens, of which the last
    one begins a document: (0, 0, 1).
    """
    begins = torch.diagonal(attention_mask[:, 0], offset=-1, dim1=1, dim2=2).to(torch.int32)
    return torch.nn.functional.pad(begins.cumsum(1, dtype=torch.int32), (1, 0))


def _bare(piece: Any) -> Any:
    while not hasattr(piece, "post_process") and hasattr(piece, "module"):
        piece = piece.module
    return piece


def micro_batches() -> int:
    """Return the micro-batches of one data-parallel rank in the coming step, as Megatron's ramp-up has set them."""
    return int(get_num_microbatches())


class SequenceLosses:
    """Reads the loss of every sequence of a training step off the user's forward step, for strategies that learn."""

    def __init__(self, micro_batch_size: int, groups: Groups, device: torch.device) -> None:
        self._size, self._groups, self._device = micro_batch_size, groups, device
        self._own = torch.empty(0)
        self._seen = 0

    def reading(self, forward_step: ForwardStep, masks: Sequence[Tensor]) -> ForwardStep:
        """Wrap `forward_step`; masks: the loss mask [b, L] of each of this rank's micro-batches, in order."""
        count = len(masks)
        self._own = torch.zeros(count, self._size, dtype=torch.float32, device=self._device)
        self._seen = 0

        def wrapped(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            output, loss = forward_step(data_iterator, model, *args, **kwargs)
            if _bare(model).post_process:
                index = self._seen % count  # a step that Megatron runs again begins again
                self._seen += 1
                mask = masks[index].to(self._device)
                counted = _own(mask, self._groups) != 0  # of this rank's tokens; the mean is over those of all ranks
                total = torch.where(counted, output.detach().float(), 0.0).sum(dim=1)
                self._own[index] = total / (mask != 0).sum(dim=1)
            return output, loss

        return wrapped

    def gathered(self) -> Tensor:
        """Return [K] losses on the CPU in the order micro-batch, data-parallel rank, row. Collective."""
        groups, own = self._groups, self._own.flatten()
        if groups.cp is not None:
            dist.all_reduce(own, group=groups.cp)
        if groups.pp is not None:
            dist.broadcast(own, src=dist.get_global_rank(groups.pp, groups.pp_size - 1), group=groups.pp)
        every = of_all_ranks(own, groups).cpu()
        return every.view(groups.dp_size, -1, self._size).transpose(0, 1).reshape(-1)


# --- datasets -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def datasets_on_every_rank() -> Iterator[list[bool]]:
    """Build datasets on all ranks inside the block; the list says where Megatron alone would have built each one.

    Any rank may then read any candidate: the files are memory-mapped, and no token has to be sent.
    """
    init = BlendedMegatronDatasetBuilder.__init__
    alone: list[bool] = []

    def everywhere(
        self: Any, cls: Any, sizes: Any, is_built_on_rank: Callable[[], bool], *args: Any, **kw: Any
    ) -> None:
        alone.append(bool(is_built_on_rank()))
        init(self, cls, sizes, lambda: True, *args, **kw)

    BlendedMegatronDatasetBuilder.__init__ = everywhere
    try:
        yield alone
    finally:
        BlendedMegatronDatasetBuilder.__init__ = init


def indexed_dataset(prefix: str, train: Any) -> Any:
    """Open `prefix`.bin / .idx as `train` opens its own: same length, tokenizer and masks; one epoch. Collective."""
    parts = getattr(train, "datasets", [train])
    kind = GPTDataset if isinstance(parts[0], MockGPTDataset) else type(parts[0])
    config = dataclasses.replace(
        train.config,
        blend=([prefix], None),
        blend_per_split=None,
        split="1,0,0",
        full_validation=False,
        multiple_validation_sets=False,
    )
    return BlendedMegatronDatasetBuilder(kind, [None, None, None], lambda: True, config).build()[0]


def loop_groups() -> Groups:
    """Read this process's place in the groups that Megatron-LM has made."""
    return megatron_groups()
