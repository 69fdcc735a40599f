"""Megatron's own data parallelism, optimizers and schedules behind the `TrainEngine` protocol."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor, nn

from megatron_opus.backends.engines.base import WholeModelRunner, accumulation_steps, evaluate, of_all_ranks
from megatron_opus.backends.engines.hyper import kind_of
from megatron_opus.backends.engines.losses import sequence_losses, unweighted_losses
from megatron_opus.backends.engines.megatron import checkpoints, muon
from megatron_opus.backends.engines.megatron.distributed_optimizer import MegatronState
from megatron_opus.backends.engines.megatron.pipeline import ScheduleRunner, run_schedule
from megatron_opus.backends.engines.schedule import learning_rate
from megatron_opus.backends.model import cpu_shims, releases, stages
from megatron_opus.backends.model.build import DTYPES
from megatron_opus.backends.model.gpt import forward_loss, forward_piece
from megatron_opus.config import RunConfig
from megatron_opus.types import Batch, Groups, MicrobatchRunner, StepResult

BUCKETS = 4  # at least: a bucket is reduced, and gathered, while the pass through the others goes on
MAX_BUCKET = 40_000_000  # elements; Megatron's own default


class MegatronEngine:
    """megatron.core's DistributedDataParallel, optimizers and schedules as a `TrainEngine`."""

    def __init__(self, model: nn.Module, config: RunConfig, groups: Groups) -> None:
        """Wrap an initialised model. Collective.

        Raises ConfigError for batch sizes or a schedule that do not fit, and UnsupportedRelease where Muon is asked of
        a release without it.
        """
        t, p = config.training, config.parallel
        if config.optimizer.name == "muon":
            releases.megatron_muon()
        self.groups = groups
        self.device = next(model.parameters()).device
        self._config, self._model = config, model
        self._rate = learning_rate(config.optimizer, t.train_steps)
        self._micro_batches = accumulation_steps(config, groups.dp_size)
        self._steps = 0  # completed
        self._wrapped = _wrap(stages.pieces(model), config)
        with cpu_shims.cuda_names():
            self._optimizer = get_megatron_optimizer(
                _optimizer_config(config), self._wrapped, use_gloo_process_groups=False
            )
        if config.optimizer.name == "muon":
            muon.mark_masters(self._optimizer)
        self._set_rates()
        megatron = self._wrapped[0].config
        megatron.finalize_model_grads_func = finalize_model_grads
        if p.overlap_grad_reduce:
            waiting = [wrapped.no_sync for wrapped in self._wrapped]
            megatron.no_sync_func = waiting if len(waiting) > 1 else waiting[0]
        sharded = "layer-wise" if config.optimizer.name == "muon" else "distributed"
        kind = sharded if p.use_distributed_optimizer else "replicated"
        self.description = (
            f"{t.precision}, Megatron's {kind} optimizer, tensor parallel {groups.tp_size} x pipeline parallel "
            f"{groups.pp_size} x data parallel {groups.dp_size}, {config.optimizer.name}"
        )

    @property
    def lr(self) -> float:
        return self._rate(self._steps)

    @property
    def module(self) -> nn.Module:
        return self._model

    def optimizer_state(self) -> MegatronState:
        return MegatronState(self._optimizer, self.groups, lambda: self._steps)

    def runner(self) -> MicrobatchRunner:
        pieces = stages.pieces(self._model)
        if self.groups.pp is None:
            return WholeRunner(pieces[0], forward_loss, self.device, self._gathered)
        return ScheduleRunner(pieces, self.device, self._gathered)

    # --- training ---------------------------------------------------------------------------------------------------

    def train_step(self, iterator: Iterator[Batch], *, per_sequence: bool = False) -> StepResult:
        count, size, lr = self._micro_batches, self._config.training.micro_batch_size, self.lr
        for wrapped in self._wrapped:
            wrapped.train()
            wrapped.zero_grad_buffer()
        self._optimizer.zero_grad()
        taken: list[Batch] = []

        def micro(index: int) -> Batch:
            while len(taken) <= index:
                batch = next(iterator)
                if len(batch) != size:
                    raise ValueError(f"microbatch {len(taken)}: expected {size} sequences, got {len(batch)}")
                taken.append(batch.to(self.device))
            return taken[index]

        losses = torch.zeros(count, dtype=torch.float32, device=self.device)
        own = torch.zeros(count, size, dtype=torch.float32, device=self.device)

        def forward(piece: Any, index: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            batch = micro(index)

            def loss(token_losses: Tensor) -> Tensor:
                mean = sequence_losses(token_losses.float(), batch.loss_mask).mean()
                losses[index] = mean.detach()
                if per_sequence:
                    own[index] = unweighted_losses(token_losses.detach().float(), batch.loss_mask)
                return mean

            return forward_piece(piece, batch), loss

        length = micro(0).tokens.shape[1]
        run_schedule(self._wrapped, count, forward, size=size, length=length)
        norm, applied = self._take_step()
        total = self._of_last_stage(losses).sum() / (count * self.groups.dp_size)
        if self.groups.dp is not None:
            dist.all_reduce(total, group=self.groups.dp)
        gathered = of_all_ranks(self._of_last_stage(own.flatten()), self.groups).cpu() if per_sequence else None
        return StepResult(loss=total.item(), grad_norm=norm, lr=lr, skipped=not applied, sequence_loss=gathered)

    def _take_step(self) -> tuple[float, bool]:
        """Return the gradient norm before clipping, and whether the weights were updated."""
        limit = self._config.training.gradient_clipping
        with cpu_shims.cuda_names():
            self._optimizer.prepare_grads()
            norm = float(self._optimizer.get_grad_norm())
            if not math.isfinite(norm):  # Megatron alone would take this step
                return math.inf, False
            if limit > 0:
                for part in self._optimizer.chained_optimizers:
                    if parameters := part.get_parameters():
                        clip_grad_by_total_norm_fp32(parameters, limit, norm)
            self._optimizer.step_with_ready_grads()
        self._steps += 1
        self._set_rates()
        return norm, True

    def _set_rates(self) -> None:
        """Set rate and decay of the coming step, which Megatron leaves to its training loop."""
        o, lr = self._config.optimizer, self.lr
        for part, _ in muon.leaves(self._optimizer):
            for group in part.optimizer.param_groups:
                by_muon = kind_of(part.optimizer, group) == "muon"
                group["lr"] = lr * group["lr_mult"] * (o.muon_lr / o.lr if by_muon else 1.0)
                group["weight_decay"] = (o.muon_weight_decay if by_muon else o.weight_decay) * group["wd_mult"]

    def _of_last_stage(self, values: Tensor) -> Tensor:
        if self.groups.pp is not None:
            last = dist.get_global_rank(self.groups.pp, self.groups.pp_size - 1)
            dist.broadcast(values, src=last, group=self.groups.pp)
        return values

    def _gathered(self) -> contextlib.AbstractContextManager[None]:
        return gathered(self._wrapped)

    # --- evaluation and checkpoints ---------------------------------------------------------------------------------

    def evaluate(self, batches: Mapping[str, Batch], micro_batch_size: int) -> dict[str, float]:
        return evaluate(
            self.runner(), batches, self.groups, micro_batch_size, self.device, equally_often=self.groups.ep is not None
        )

    def save(self, path: Path) -> None:
        with self._gathered(), cpu_shims.cuda_names():
            checkpoints.save(path / "engine", stages.pieces(self._model), self._optimizer, self._steps)

    def rank_state(self) -> dict[str, Any] | None:
        return None

    def load(self, path: Path, rank_state: Mapping[str, Any] | None) -> None:
        with self._gathered(), cpu_shims.cuda_names():
            self._steps = checkpoints.load(path / "engine", stages.pieces(self._model), self._optimizer)
        self._set_rates()


@contextlib.contextmanager
def gathered(wrapped: Sequence[Any]) -> Iterator[None]:
    """Gather the weights that the last step has updated, and keep them: outside a training step nothing waits.

    The hooks of `overlap_param_gather` gather them in the next forward pass of training, and refuse frozen ones.
    `wrapped` are this stage's pieces inside their DistributedDataParallel.
    """
    hooked = [piece for piece in wrapped if piece.remove_forward_pre_hook_handles]
    for piece in hooked:
        piece.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for piece in hooked:
            piece.enable_forward_pre_hook()


class WholeRunner(WholeModelRunner):
    """Runs micro-batches through the bare model, between or inside the accumulation steps of its wrapper."""

    def __init__(
        self,
        model: nn.Module,
        token_losses: Callable[[Any, Batch], Tensor],
        device: torch.device,
        gathered: Callable[[], Any],
    ) -> None:
        super().__init__(model, token_losses, device)
        self._gathered = gathered

    def losses(self, batches: Any) -> list[Tensor] | None:
        with self._gathered():
            return super().losses(batches)

    def backward(self, micros: Any) -> None:
        with self._gathered():
            super().backward(micros)

    def weight_gradients(self, micro: Any, weights: Any, read: Callable[[int, Tensor], None]) -> None:
        with self._gathered():
            super().weight_gradients(micro, weights, read)


def _wrap(pieces: list[Any], config: RunConfig) -> list[Any]:
    p = config.parallel
    parameters = sum(x.numel() for piece in pieces for x in piece.parameters())
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=p.use_distributed_optimizer,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        bucket_size=min(MAX_BUCKET, parameters // BUCKETS + 1) if p.overlap_grad_reduce else None,
    )
    with cpu_shims.cuda_names():
        layer_wise = config.optimizer.name == "muon" and p.use_distributed_optimizer
        more = muon.buffer_layouts(pieces, settings) if layer_wise else [{}] * len(pieces)
        return [
            # buckets pay on the first piece of a stage, whose backward pass is the last one
            DistributedDataParallel(piece.config, settings, piece, disable_bucketing=number > 0, **more[number])
            for number, piece in enumerate(pieces)
        ]


def _optimizer_config(config: RunConfig) -> OptimizerConfig:
    o, p = config.optimizer, config.parallel
    more: dict[str, Any] = {"use_distributed_optimizer": p.use_distributed_optimizer}
    if o.name == "muon":
        more = muon.options(o, layer_wise=p.use_distributed_optimizer)
    return OptimizerConfig(
        optimizer="adam" if o.name == "adamw" else o.name,
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_eps=o.adam_eps,
        sgd_momentum=o.sgd_momentum,
        bf16=config.training.precision == "bf16",
        params_dtype=DTYPES[config.training.precision],
        overlap_param_gather=p.overlap_param_gather,
        clip_grad=0.0,  # done by `_take_step`
        **more,
    )
