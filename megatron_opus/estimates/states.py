"""Count weights, gradients and optimizer state of one rank, under each engine.

P: parameters of this rank's stage, D: ranks over which an optimizer's state is split (data x context parallel; of
experts, those that hold the same ones), e: bytes of a weight (4, or 2 in bf16), s: numbers that the optimizer keeps for
each parameter (AdamW 2, Muon 1, SGD 1 with momentum and 0 without; one more where the selector keeps a second moment
for Muon's matrices).

DeepSpeed              weights  gradients             optimizer (masters and state)
ZeRO 0, fp32           4 P      4 P                   4 s P
ZeRO 0, bf16           2 P      2 P, 4 P in the step  4 (1 + s) P
ZeRO 1                 e P      e P                   4 (1 + s) P / D
ZeRO 1, bf16, accum.   2 P      2 P + 4 P             4 (1 + s) P / D
ZeRO 2                 e P      (e or 4) P / D        4 (1 + s) P / D  plus a bucket of gradients on their way
ZeRO 3                 e P / D  as ZeRO 2             4 (1 + s) P / D  plus gathered weights; e P while it starts

Megatron
replicated, fp32       4 P      4 P                   4 s P
replicated, bf16       2 P      4 P                   4 (1 + s) P
distributed, fp32      4 P      4 P                   4 s P / D        the weights are their own masters
distributed, bf16      2 P      4 P                   4 (1 + s) P / D

Megatron's gradients lie in one float32 buffer for the whole run. Its distributed optimizer copies the weights into a
buffer, too: e P more for a moment at the start, before there is any state. With Muon, its layer-wise optimizer has each
matrix whole on one data-parallel rank; the fullest is taken to have one matrix more than its share. What fills buffers
up to whole shards is left out.

With DeepSpeed's Muon at ZeRO 1 and 2, a second copy of its momentum waits until the step is known to be good. An
optimizer that is offloaded from a GPU costs nothing there; whether the host can hold it is not looked into.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opus.backends.engines.deepspeed.memory import gradient_bucket
from megatron_opus.config import RunConfig, keeps_second_moment
from megatron_opus.estimates.activations import element
from megatron_opus.layout.model_layout import ModelLayout
from megatron_opus.layout.parallel_layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Holds bytes per rank."""

    weights: float
    optimizer: float
    kept: float  # gradient buffers that live between steps
    gradients: float  # of one training pass
    step: float  # gradients and temporaries of the optimizer's step
    startup: float = 0.0  # before weights are cut, or while they move into a buffer
    gathered: float = 0.0  # weights that come and go during a pass


def state_bytes(config: RunConfig, model: ModelLayout, layout: ParallelLayout, device: str) -> StateBytes:
    """Count the state of the layout's engine for a stage of the model, on "cpu" or "cuda"."""
    return (_megatron if layout.engine == "megatron" else _deepspeed)(config, model, layout, device)


# --- Megatron -------------------------------------------------------------------------------------------------------


def _megatron(config: RunConfig, model: ModelLayout, layout: ParallelLayout, device: str) -> StateBytes:
    o, e, p = config.optimizer, element(config), model.local_size()
    master = 4.0 if config.training.precision == "bf16" else 0.0
    per = master + {"adamw": 8.0, "muon": 8.0, "sgd": 4.0 * (o.sgd_momentum > 0)}[o.name]
    split = layout.distributed_optimizer
    shards, expert_shards = (layout.shards, layout.expert_shards) if split else (1, 1)
    muons = [x.name for x in model.matrices if x.kind not in ("embedding", "output")] if o.name == "muon" else []
    experts = model.local_size([x.name for x in model.parameters if x.expert is not None and x.name not in muons])
    by_muon = float(model.local_size(muons))
    largest = max(float(model.local_size([x.name])) for x in model.parameters)
    optimizer = per * ((p - experts - by_muon) / shards + experts / expert_shards)
    temporaries = 0.0
    if muons:
        most = max(float(model.local_size([name])) for name in muons)
        optimizer += (master + 4.0) * min(by_muon, by_muon / shards + (most if shards > 1 else 0.0))
        # one matrix being orthogonalised, of all tensor-parallel ranks where it is whole
        temporaries = 16.0 * most * (1 if o.muon_tp_mode == "blockwise" else layout.tp)
    if device == "cpu":  # PyTorch's optimizers make two tensors as large as the one they update
        temporaries = max(temporaries, 8.0 * min(largest, p / shards))
    return StateBytes(
        weights=float(e * p),
        optimizer=optimizer,
        kept=4.0 * p,
        gradients=e * largest,  # autograd's own, until it is added to the buffer
        step=temporaries,
        startup=max(0.0, e * p - optimizer) if split else 0.0,
    )


# --- DeepSpeed ------------------------------------------------------------------------------------------------------


def _deepspeed(config: RunConfig, model: ModelLayout, layout: ParallelLayout, device: str) -> StateBytes:
    t, dp, e, p = config.training, layout.dp, element(config), model.local_size()
    bf16 = t.precision == "bf16"
    accumulates = t.global_batch_size > layout.micro_batch_size * dp
    kept, startup, gathered = 0.0, 0.0, 0.0
    optimizer, temporaries = _zero_optimizer(config, model, layout, device)
    if layout.zero_stage == 0:
        gradients = float(e * p)
        step = gradients + (4.0 * p if bf16 else 0.0)
    else:
        bucket = float(e * gradient_bucket(p))
        if layout.zero_stage == 1:
            gradients = float(e * p)
            kept = 4.0 * p if bf16 and accumulates else 0.0
        else:
            gradients = (4.0 if bf16 and accumulates else float(e)) * p / dp + 2 * bucket
        # this rank's part of the averaged gradients, and its float32 copy where it is not summed in float32 already
        step = 8.0 * p / dp
        if kept:
            step = gradients
        elif layout.zero_stage == 1:
            step += gradients
        elif bf16 and accumulates:
            step = 4.0 * p / dp
        if layout.zero_stage == 3:
            startup = float(e * p)  # the model is built whole and then cut
            gathered = bucket if dp > 1 else 0.0
    return StateBytes(
        weights=float(e * p) / (dp if layout.zero_stage == 3 else 1),
        optimizer=optimizer,
        kept=kept,
        gradients=gradients,
        step=step + temporaries,
        startup=startup,
        gathered=gathered,
    )


def _zero_optimizer(config: RunConfig, model: ModelLayout, layout: ParallelLayout, device: str) -> tuple[float, float]:
    """Count the bytes of masters and state that stay, and of temporaries in the step, on the device."""
    o, dp, p = config.optimizer, layout.dp, model.local_size()
    largest = float(max(model.local_size([name]) for name in model.by_muon))
    by_muon = float(model.local_size(model.by_muon)) if o.name == "muon" else 0.0
    numbers = {"adamw": 2.0, "muon": 2.0, "sgd": float(o.sgd_momentum > 0)}[o.name] * (p - by_muon)
    numbers += by_muon * (2.0 if keeps_second_moment(config) else 1.0)
    offloaded = config.parallel.offload_optimizer == "cpu"
    if by_muon and layout.zero_stage in (1, 2) and not offloaded:
        # whole matrices, also those of which this rank owns a part, and the copy that awaits the end of the step
        numbers += by_muon + 4 * largest * dp
    if layout.zero_stage > 0 or config.training.precision == "bf16":
        numbers += p
    stays = 4.0 * numbers / (dp if layout.zero_stage > 0 else 1)
    temporaries = _step_temporaries(model, layout, device)
    if by_muon:
        temporaries += 16.0 * largest  # one matrix being orthogonalised
        if layout.zero_stage == 3:
            temporaries += 8.0 * min(by_muon, gradient_bucket(p))  # gradients and momenta gathered for it
    return (0.0 if offloaded and device == "cuda" else stays), temporaries


def _step_temporaries(model: ModelLayout, layout: ParallelLayout, device: str) -> float:
    """Count what the optimizer's step allocates: PyTorch's on a CPU make two tensors as large as the one they update.

    That is one parameter at stage 0, and the whole flat partition above. Fused kernels make none.
    """
    if device == "cuda":
        return 0.0
    if layout.zero_stage == 0:
        return 8.0 * max(model.local_size([p.name]) for p in model.parameters)
    return 8.0 * model.local_size() / layout.dp
