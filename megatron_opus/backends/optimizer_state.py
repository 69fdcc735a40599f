"""Where Adam's second moment lives, for torch optimizers and DeepSpeed engines. No communication, matched by parameter.

engine                      flat storage of exp_avg_sq on this rank
torch / ZeRO 0 fp32         state[p], whole
ZeRO 0 bf16, unfused        state[fp32_groups[g][k]], whole, one fp32 master per parameter
ZeRO 0 bf16, FusedAdam      state[fp32_groups_flat[g]], whole, the group's parameters one after the other
ZeRO 1 / 2, BF16_Optimizer  state[flat partition of g], the fragment that `p._hp_mapping` describes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_opus.types import AdamHyper, Fragment, Geometry, Hyper, OptimizerState, SgdHyper

SECOND_MOMENT = "exp_avg_sq"


class UnsupportedOptimizer(TypeError):
    """An optimizer whose update the selector cannot describe."""


def optimizer_state(optimizer: Any) -> OptimizerState:
    """Reader for a torch optimizer or a DeepSpeed engine. Raises UnsupportedOptimizer."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return TorchState(optimizer)
    if hasattr(optimizer, "zero_optimization_stage") and hasattr(optimizer, "module"):
        return DeepSpeedState(optimizer)
    raise UnsupportedOptimizer(
        f"optimizer: expected a torch.optim.Optimizer or a DeepSpeed engine, got {type(optimizer).__name__}"
    )


def _kind(optimizer: Any) -> Literal["adamw", "sgd"]:
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    if names & {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}:
        return "adamw"
    if "SGD" in names:
        return "sgd"
    raise UnsupportedOptimizer(
        f"optimizer: expected Adam, AdamW, FusedAdam, DeepSpeedCPUAdam or SGD, got {type(optimizer).__name__}"
    )


class _Groups:
    """Parameter -> its group, by identity: never by position in the model."""

    def __init__(self, param_lists: Sequence[Sequence[Tensor]]) -> None:
        self._where = {id(p): (g, k) for g, group in enumerate(param_lists) for k, p in enumerate(group)}

    def __call__(self, weight: Tensor) -> tuple[int, int]:
        try:
            return self._where[id(weight)]
        except KeyError:
            raise UnsupportedOptimizer(
                f"a scored weight of shape {list(weight.shape)} belongs to no parameter group of the optimizer; freeze "
                "it (requires_grad=False) so that it is not scored, or give it to the optimizer"
            ) from None


def _numbers(values: Sequence[float | Tensor]) -> list[float]:
    """Plain numbers; all tensors among them are read with one synchronisation, not one each."""
    tensors = [v.detach().double().flatten() for v in values if isinstance(v, Tensor)]
    if not tensors:
        return [float(v) for v in values]
    device = tensors[0].device
    read = iter(torch.cat([t.to(device, non_blocking=True) for t in tensors]).tolist())
    return [next(read) if isinstance(v, Tensor) else float(v) for v in values]


def _hypers(kind: str, geometry: Geometry, found: Sequence[tuple[dict[str, Any], dict[str, Any], bool]]) -> list[Hyper]:
    """Hyper-parameters for each (parameter group, state of the parameter, whether a real step was taken)."""
    wanted = kind if geometry == "auto" else geometry
    if wanted not in (kind, "sgd"):
        raise UnsupportedOptimizer(f"geometry {wanted}: the optimizer in use is {kind} and keeps no state for it")
    # FusedAdam counts its steps in the group, torch and DeepSpeedCPUAdam in the state
    steps = _numbers([state.get("step", group.get("step", 0)) if started else 0 for group, state, started in found])
    rates = _numbers([group["lr"] for group, _, _ in found])
    if wanted == "sgd":
        return [SgdHyper(lr=lr) for lr in rates]
    result: list[Hyper] = []
    for (group, state, started), step, lr in zip(found, steps, rates, strict=True):
        if group.get("amsgrad") or (state and not started and SECOND_MOMENT not in state):
            raise UnsupportedOptimizer(
                f"optimizer: expected AdamW with its second moment under {SECOND_MOMENT!r} and without amsgrad, found "
                f"state {sorted(map(str, state))}, amsgrad {bool(group.get('amsgrad'))}"
            )
        beta1, beta2 = (float(b) for b in group["betas"])
        result.append(AdamHyper(lr=lr, beta1=beta1, beta2=beta2, eps=float(group["eps"]), step=int(step)))
    return result


class TorchState:
    """A torch optimizer in one process, or replicated over data-parallel ranks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.kind = _kind(optimizer)
        self.sharded_over_dp = False
        self._optimizer = optimizer
        self._groups = _Groups([group["params"] for group in optimizer.param_groups])

    def hypers(self, weights: Sequence[torch.nn.Parameter], geometry: Geometry = "auto") -> list[Hyper]:
        found = []
        for weight in weights:
            state = self._optimizer.state.get(weight, {})
            found.append((self._optimizer.param_groups[self._groups(weight)[0]], state, SECOND_MOMENT in state))
        return _hypers(self.kind, geometry, found)

    def momentum(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        return []

    def second_moment(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        return [Fragment(start=0, values=self._optimizer.state[weight][SECOND_MOMENT].flatten())]


class DeepSpeedState:
    """A DeepSpeed engine at ZeRO stage 0, 1 or 2."""

    def __init__(self, engine: Any) -> None:
        stage = engine.zero_optimization_stage()
        if stage > 2:
            raise UnsupportedOptimizer(f"zero_stage: expected 0, 1 or 2, got {stage}")
        self._engine = engine
        self._wrapper = engine.optimizer
        self._optimizer = getattr(self._wrapper, "optimizer", self._wrapper)
        self.kind = _kind(self._optimizer)
        self._flat: list[Tensor] | None = None  # one flat tensor per group
        self._masters: list[list[Tensor]] | None = None  # one tensor per parameter
        wrapper = self._wrapper
        if hasattr(wrapper, "bit16_groups"):  # ZeRO 1 and 2
            params, self._flat = wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups
            self.sharded_over_dp = True
        elif hasattr(wrapper, "bf16_groups"):  # BF16_Optimizer: ZeRO 1 with fp32 gradient accumulation
            params, self._flat = wrapper.bf16_groups, wrapper.fp32_groups_flat_partition
            self.sharded_over_dp = True
        elif hasattr(wrapper, "fp32_groups_flat"):  # FP16_Optimizer around a fused Adam, also for bf16
            params, self._flat = wrapper.fp16_groups, wrapper.fp32_groups_flat
            self.sharded_over_dp = False
        elif hasattr(wrapper, "fp32_groups"):  # FP16_UnfusedOptimizer, also for bf16
            params, self._masters = wrapper.fp16_groups, wrapper.fp32_groups
            self.sharded_over_dp = False
        elif isinstance(wrapper, torch.optim.Optimizer):
            params = [group["params"] for group in wrapper.param_groups]
            self._masters = params
            self.sharded_over_dp = False
        else:
            raise UnsupportedOptimizer(f"DeepSpeed optimizer wrapper {type(wrapper).__name__}: layout not known")
        self._params = params
        self._groups = _Groups(params)

    def hypers(self, weights: Sequence[torch.nn.Parameter], geometry: Geometry = "auto") -> list[Hyper]:
        found = []
        for weight in weights:
            g, k = self._groups(weight)
            state = self._optimizer.state.get(self._key(g, k), {})
            # bf16 at stage 0 takes a dummy step on zero gradients when it starts: only the engine knows it was none
            started = self._engine.global_steps > 0 and SECOND_MOMENT in state
            found.append((self._optimizer.param_groups[g], state, started))
        return _hypers(self.kind, geometry, found)

    def momentum(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        return []

    def second_moment(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        g, k = self._groups(weight)
        if self.sharded_over_dp:
            mapping: Any = vars(weight)["_hp_mapping"]  # set by DeepSpeed on every parameter it partitions
            if mapping is None:
                return []  # another data-parallel rank owns all of it
            values = self._optimizer.state[self._key(g, k)][SECOND_MOMENT]
            owned = values.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)
            return [Fragment(start=mapping.lp_fragment_address.start, values=owned)]
        values = self._optimizer.state[self._key(g, k)][SECOND_MOMENT].flatten()
        if self._flat is not None:
            start = sum(p.numel() for p in self._params[g][:k])
            values = values.narrow(0, start, weight.numel())
        return [Fragment(start=0, values=values)]

    def _key(self, group: int, index: int) -> Tensor:
        if self._flat is not None:
            return self._flat[group]
        assert self._masters is not None
        return self._masters[group][index]
