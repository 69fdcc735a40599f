"""Read the hyper-parameters of the coming step from the parameter groups of an optimizer."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_opus.errors import UnsupportedOptimizer
from megatron_opus.types import AdamHyper, Geometry, Hyper, MuonHyper, SgdHyper

SECOND_MOMENT = "exp_avg_sq"
MOMENTUM = "momentum_buffer"
Kind = Literal["adamw", "muon", "sgd", "other"]
_KNOWN: tuple[tuple[Kind, frozenset[str]], ...] = (
    ("adamw", frozenset({"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"})),
    ("sgd", frozenset({"SGD"})),
)
# Optimizers that keep a state of another kind, though they are made of one that is known
_NOT_THOSE = {"AdaptiveMuon"}


def kind_of(optimizer: Any, group: dict[str, Any]) -> Kind:
    """Say what updates the parameters of this group: `other` for an optimizer whose geometry is not known."""
    classes = type(optimizer).__mro__
    names = {cls.__name__ for cls in classes}
    # torch has a Muon of its own, with other numbers
    from_deepspeed = any(cls.__module__.startswith("deepspeed.") for cls in classes)
    if from_deepspeed and names & {"MuonWithAuxAdam", "SingleDeviceMuonWithAuxAdam"}:
        return "muon" if group["use_muon"] else "adamw"
    if from_deepspeed and names & {"Muon", "SingleDeviceMuon"}:
        return "muon"
    for kind, known in _KNOWN:
        if names & known:
            # one that inherits the state and takes another step with it is not one of those
            return kind if known.intersection(type(optimizer).step.__qualname__.split(".")[-2:-1]) else "other"
    if "TensorParallelMuon" in names and not names & _NOT_THOSE:  # Megatron's
        return "muon"
    return "other"


def full_name(optimizer: Any) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__name__}"


def _numbers(values: Sequence[Any], what: str) -> list[float]:
    """Plain numbers; all tensors among them are read with one synchronisation, not one each."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Tensor | numbers.Real):
            raise UnsupportedOptimizer(f"optimizer: expected a number or a tensor as {what}, got {value!r}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise UnsupportedOptimizer(
                f"optimizer: expected one learning rate and one step count for each parameter group, got a tensor of "
                f"shape {list(value.shape)}"
            )
    tensors = [v.detach().double().flatten() for v in values if isinstance(v, Tensor)]
    if not tensors:
        return [float(v) for v in values]
    device = tensors[0].device
    read = iter(torch.cat([t.to(device, non_blocking=True) for t in tensors]).tolist())
    return [next(read) if isinstance(v, Tensor) else float(v) for v in values]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of one weight's coming step."""

    weight: Tensor
    kind: Kind
    optimizer: str  # its full name
    group: dict[str, Any]
    state: dict[str, Any]
    steps: int | None  # completed steps as the engine counts them; None: nobody counts them for us


MuonRule = Callable[[Found, float], MuonHyper]


def hypers(
    found: Sequence[Found],
    geometry: Geometry,
    has_muon: bool,
    *,
    muon: MuonRule,
    own_adam: Callable[[float], AdamHyper] | None = None,
) -> list[Hyper]:
    """Describe the coming step of every weight, with at most one device synchronisation for all of them.

    `muon` reads the numbers of a Muon step from the library that takes it. `own_adam(lr)` describes the second moment
    that the selector keeps for Muon's weights, where it keeps one. Raises UnsupportedOptimizer.
    """
    # FusedAdam counts its steps in the group, torch and DeepSpeedCPUAdam in the state
    counts = [0 if f.steps == 0 else f.state.get("step", f.group.get("step")) for f in found]
    adam = [f.kind == "adamw" and bool(f.state) for f in found]  # the others are not asked for their steps
    steps = _numbers([x if x is not None or a else 0 for x, a in zip(counts, adam, strict=True)], "count of steps")
    rates = _numbers([f.group.get("lr") for f in found], "learning rate")
    result: list[Hyper] = []
    for f, step, lr in zip(found, steps, rates, strict=True):
        _check_group(f, lr)
        if not (math.isfinite(step) and step >= 0):
            raise UnsupportedOptimizer(f"optimizer: expected a count of completed steps, got {step}")
        wanted = f.kind if geometry == "auto" else geometry
        if wanted == "muon" and f.kind == "adamw" and has_muon:
            wanted = "adamw"  # a Muon run has AdamW weights, and that is what moves them
        if wanted == "sgd":
            result.append(SgdHyper(lr=lr * _sgd_factor(f) if f.kind == "sgd" else lr))
        elif f.kind == "other":
            raise UnsupportedOptimizer(
                f"optimizer: expected Adam, AdamW, FusedAdam, DeepSpeedCPUAdam, SGD or the Muon of DeepSpeed or "
                f"Megatron, got {f.optimizer}, whose geometry is not known; score in SGD's geometry, which needs no "
                "state (selection.preconditioner.kind=sgd), or train with one of those"
            )
        elif wanted == "adamw" and f.kind == "muon" and own_adam is not None:
            result.append(own_adam(lr))
        elif wanted != f.kind:
            remedy = "; set selection.preconditioner.kind=adamw before the run starts" if f.kind == "muon" else ""
            raise UnsupportedOptimizer(
                f"geometry {wanted}: a scored weight is updated by {f.kind} and no state for {wanted} is kept{remedy}"
            )
        elif wanted == "adamw":
            result.append(_adam(f, int(step), lr))
        else:
            result.append(muon(f, lr))
    return result


def _check_group(f: Found, lr: float) -> None:
    """Refuse an update that does not go down the gradient at a finite rate: its scores would have the wrong sign."""
    if f.group.get("maximize"):
        raise UnsupportedOptimizer(
            "optimizer: expected one that minimizes, got maximize=True: its update goes up the gradient; minimize the "
            "negative loss instead"
        )
    if not (math.isfinite(lr) and lr >= 0):
        raise UnsupportedOptimizer(f"optimizer: expected a learning rate that is finite and not negative, got {lr}")


def _adam(f: Found, step: int, lr: float) -> AdamHyper:
    missing = f.state and f.steps != 0 and f.state.get(SECOND_MOMENT) is None
    if f.group.get("amsgrad") or missing:
        raise UnsupportedOptimizer(
            f"optimizer: expected AdamW with its second moment under {SECOND_MOMENT!r} and without amsgrad, found "
            f"state {sorted(map(str, f.state))}, amsgrad {bool(f.group.get('amsgrad'))}"
        )
    betas = f.group.get("betas")
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise UnsupportedOptimizer(f"optimizer: expected two betas in each parameter group, got {betas!r}")
    beta1, beta2, eps = _numbers([*betas, f.group.get("eps")], "beta or eps")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= eps < math.inf):
        raise UnsupportedOptimizer(
            f"optimizer: expected 0 <= beta < 1 and eps that is finite and not negative, got betas ({beta1}, {beta2}), "
            f"eps {eps}"
        )
    return AdamHyper(lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step)


def _sgd_factor(f: Found) -> float:
    """Share of a new gradient in SGD's coming step: 1, but 1 + mu with Nesterov and 1 - dampening once it runs."""
    for name in ("momentum", "dampening"):
        if not math.isfinite(float(f.group.get(name, 0.0))):
            raise UnsupportedOptimizer(f"optimizer: expected a finite {name}, got {f.group[name]}")
    if f.group.get("nesterov"):
        return 1.0 + float(f.group["momentum"])
    running = f.state.get(MOMENTUM) is not None
    return 1.0 - float(f.group.get("dampening", 0.0)) if running else 1.0


def kinds(optimizer: Any, groups: Iterable[dict[str, Any]]) -> list[Kind]:
    return [kind_of(optimizer, group) for group in groups]


def find(table: Mapping[int, Any], weight: Tensor) -> Any:
    """Look a parameter up by identity. Raises UnsupportedOptimizer for one that belongs to no parameter group."""
    try:
        return table[id(weight)]
    except KeyError:
        raise UnsupportedOptimizer(
            f"a scored weight of shape {list(weight.shape)} belongs to no parameter group "
            "of the optimizer; freeze it (requires_grad=False) so that it is not scored, or give it to the optimizer"
        ) from None
