"""DeepSpeed's Muon, as installed: which weights get it, and the numbers of its update.

W <- (1 - lr * decay) W - lr * scale * NewtonSchulz(q), with m <- mu m + (1 - mu) g and q = (1 - mu) g + mu m. Its
functions carry the numbers as literals and defaults; they are read from there, so that another version is either
described as it is or refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import ModuleType
from typing import Any

from torch import nn

from megatron_opus.backends.engines.deepspeed.partition import local_shape
from megatron_opus.backends.engines.hyper import MOMENTUM, Found
from megatron_opus.backends.model import cpu_shims, releases
from megatron_opus.errors import UnsupportedOptimizer
from megatron_opus.types import MuonHyper


def tag(model: nn.Module, by_muon: Collection[str]) -> None:
    """Set `use_muon` on every parameter: DeepSpeed's ZeRO optimizers look for it there."""
    for name, parameter in model.named_parameters():
        parameter.use_muon = name in by_muon  # type: ignore[attr-defined]


def kernels() -> ModuleType:
    """DeepSpeed's module of Muon functions; without accelerator they run eagerly.

    They are decorated with torch.compile, whose first call on a CPU takes minutes and gains nothing.
    Raises UnsupportedRelease.
    """
    functions, optimizers = releases.deepspeed_muon()
    if cpu_shims.active():
        for module in (functions, optimizers):
            for name, value in list(vars(module).items()):
                eager = getattr(value, "_torchdynamo_orig_callable", None)
                if eager is not None:
                    setattr(module, name, eager)
    return functions


def shape_scale(rows: int, columns: int) -> float:
    """The factor of a matrix of this shape: of the **local** shard, for that is what DeepSpeed orthogonalises."""
    return float(kernels()._aspect_ratio_scale(rows, columns))


def nesterov() -> bool:
    return bool(_default("nesterov"))


def coefficients(ns_method: str) -> tuple[tuple[float, float, float], ...]:
    """(a, b, c) of each Newton-Schulz step X <- a X + b A X + c A^2 X, A = X X^T, for `gram` or `standard`.

    Both compute the same function. Raises UnsupportedOptimizer when the installed version hides its numbers.
    """
    module = kernels()
    name = {"gram": "zeropower_via_gram_newtonschulz", "standard": "zeropower_via_newtonschulz5"}.get(ns_method, "")
    function = inspect.unwrap(getattr(module, name)) if hasattr(module, name) else None
    constants = () if function is None else function.__code__.co_consts
    found = [c for c in constants if isinstance(c, tuple) and len(c) == 3 and all(isinstance(x, float) for x in c)]
    if len(found) != 1:
        raise UnsupportedOptimizer(
            f"Muon: expected one triple of Newton-Schulz coefficients in DeepSpeed's {name or ns_method!r}, found "
            f"{found}; this DeepSpeed is not known: use the version in constraints.txt, or "
            "selection.preconditioner.kind=adamw"
        )
    return (found[0],) * int(_default("ns_steps"))


def _default(name: str) -> Any:
    return inspect.signature(inspect.unwrap(kernels().muon_update)).parameters[name].default


def hyper(f: Found, lr: float) -> MuonHyper:
    """Describe the coming Muon step of one weight. Raises UnsupportedOptimizer for one that Muon takes in parts."""
    weight: Any = f.weight
    shape = local_shape(weight)
    if len(shape) != 2 or getattr(weight, "is_expert_group", False) or getattr(weight, "muon_num_heads", None):
        raise UnsupportedOptimizer(
            f"Muon: expected whole two-dimensional matrices, got shape {list(shape)}, expert group "
            f"{bool(getattr(weight, 'is_expert_group', False))}, heads {getattr(weight, 'muon_num_heads', None)}; "
            "such a weight is orthogonalised in parts, which the selector does not describe: give it to AdamW"
        )
    # without a count, a momentum is there after the first step
    steps = f.steps if f.steps is not None else int(MOMENTUM in f.state)
    return MuonHyper(
        lr=lr,
        momentum=float(f.group["momentum"]),
        nesterov=nesterov(),
        scale=shape_scale(*shape),
        coefficients=coefficients(f.group.get("ns_method", "gram")),
        step=steps,
    )
