"""Stand-ins of the tests that let Megatron-LM's whole training loop run without an accelerator, on gloo.

    python tests/support/megatron_cpu.py [--opus-config FILE] SCRIPT ARGUMENTS

Megatron's loop asks `torch.cuda` in a hundred places. Here it is told that there is one device, which is the CPU:
streams and events do nothing, tensors stay where they are, and the random state of the device is torch's own. What is
computed, sent and written is the real thing. Only for tests: the package's own shims are `backends/model/cpu_shims.py`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Nothing:
    """A stream or an event where everything is computed in order: whatever is asked of it, nothing happens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., float]:
        return lambda *args, **kwargs: 0.0


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_cpu(x) for x in args)
        return func(*args, **kwargs)


def _cpu(value: Any) -> Any:
    return CPU if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value


class FusedAdam(torch.optim.Optimizer):
    """Adam as Apex and Transformer Engine keep it: two moments for each tensor, and one step count for each group.

    With torch's own Adam, Megatron's distributed optimizer writes checkpoints that it cannot read.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._decoupled = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                gradient = p.grad if self._decoupled else p.grad + group["weight_decay"] * p
                if self._decoupled:
                    p.mul_(1 - lr * group["weight_decay"])
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                p.addcdiv_(state["exp_avg"], root, value=-lr / (1 - beta1 ** group["step"]))


class _Gathered(torch.autograd.Function):
    """Tokens [s / cp, b, h, d] of all context-parallel ranks as [s, b, h, d], in the order of the text.

    The gradient of each rank's own comes from all of them.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        first, second = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*first, *reversed(second)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return _own(total, dist.get_rank(ctx.group), dist.get_world_size(ctx.group)), None


def _own(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    chunks = x.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


def let_contexts_be_cut() -> None:
    """Let Megatron's local attention look at the keys of all context-parallel ranks, as Transformer Engine's does."""
    from megatron.core import parallel_state
    from megatron.core.models import backends
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class ContextAttention(DotProductAttention):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            alone = copy.copy(config)
            alone.context_parallel_size = 1  # what it refuses is done here
            super().__init__(alone, *args, **kwargs)

        def forward(self, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            size = parallel_state.get_context_parallel_world_size()
            if size > 1:
                group, rank = parallel_state.get_context_parallel_group(), parallel_state.get_context_parallel_rank()
                key, value = _Gathered.apply(key, group), _Gathered.apply(value, group)
                if mask is None:
                    barred = torch.ones(len(key), len(key), dtype=torch.bool).triu(1)
                    mask = _own(barred, rank, size)[None, None]
            return super().forward(query, key, value, mask, *args, **kwargs)

    backends.DotProductAttention = ContextAttention  # type: ignore[misc]


def install() -> None:
    """Import Megatron's training loop while torch still tells the truth, then put the stand-ins in its place."""
    import megatron.core.datasets.utils as dataset_utils
    import megatron.core.models.gpt
    import megatron.core.optimizer as optimizers
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.training.training  # noqa: F401
    import torch._dynamo
    from megatron.core.tensor_parallel import random as states
    from torch._dynamo.trace_rules import get_torch_obj_rule_map

    get_torch_obj_rule_map()  # what it finds in torch.cuda must be functions of torch's own
    cuda: Any = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "ipc_collect"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: 1, lambda: CPU
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Nothing()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.Stream = cuda.Event = _Nothing
    cuda.memory_stats = lambda *args, **kwargs: {}
    cuda.get_device_capability = lambda *args, **kwargs: (8, 0)
    cuda.get_device_properties = lambda *args, **kwargs: SimpleNamespace(major=8, minor=0, name="cpu")
    cuda.is_current_stream_capturing = lambda: False
    torch.accelerator.current_stream = lambda *args, **kwargs: _Nothing()  # type: ignore[assignment,return-value]
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    states._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    states._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    dataset_utils.compile_helpers = lambda: None  # the wheel has them compiled
    let_contexts_be_cut()
    optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = FusedAdam, False  # type: ignore[misc,assignment]
    distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = True, True
    distributed.Adam = FusedAdam  # type: ignore[misc,assignment]
    barrier = dist.barrier
    dist.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group=group, async_op=async_op)
    _CudaIsCpu().__enter__()


def run(arguments: list[str]) -> None:
    """Run a Megatron-LM script under the stand-ins, through the hook where `--opus-config` is among the arguments."""
    if any(argument.startswith("--opus-config") for argument in arguments):
        from megatron_opus.integrations.megatron_lm.__main__ import main

        main(arguments)
        return
    import runpy

    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def use_checkout(root: Path) -> None:
    """Import the Megatron-LM of a checkout from now on, with the compiled dataset helpers of the installed wheel."""
    [compiled] = Path(importlib.metadata.distribution("megatron-core").locate_file("megatron/core/datasets")).glob(
        "helpers_cpp*.so"
    )
    name = "megatron.core.datasets.helpers_cpp"
    spec = importlib.util.spec_from_file_location(name, compiled)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    sys.path.insert(0, str(root))
    kernels = root / "megatron" / "legacy" / "fused_kernels"
    if kernels.is_dir():  # of 0.16: would be compiled for a GPU
        importlib.import_module("megatron.legacy.fused_kernels").load = lambda arguments: None  # type: ignore[attr-defined]


if __name__ == "__main__":
    torch.set_num_threads(1)
    script = next(Path(word) for word in sys.argv[1:] if word.endswith(".py"))
    if (script.parent / "megatron" / "training").is_dir():
        use_checkout(script.parent)
    install()
    run(sys.argv[1:])
