"""Everything that makes megatron-core and DeepSpeed run without an accelerator. Inert where there is one.

megatron-core asks `torch.cuda` for the current device and keeps its random states in CUDA generators;
DeepSpeed compiles a shared-memory collective on its first use. Nothing else in the package knows about these.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_opus.backends.model import releases

megatron_random: Any = releases.megatron_random()

_MARK = "_megatron_opus_cpu_shim"
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_LARGE = 4 * 2**20  # bytes


def active() -> bool:
    """True when there is no accelerator, so that the shims apply."""
    return not torch.cuda.is_available()


def install() -> bool:
    """Apply the process-wide shims once; False, and nothing changed, when there is an accelerator.

    Call before `deepspeed.init_distributed` and before any Megatron layer is built.
    """
    if not active():
        return False
    if not hasattr(torch.cuda.current_device, _MARK):

        def current_device() -> torch.device:
            return torch.device("cpu")

        setattr(current_device, _MARK, True)
        torch.cuda.current_device = current_device  # type: ignore[assignment]
        # Recomputing a layer restores every generator, the one of a device that is not there as well.
        megatron_random._get_cuda_rng_state = _no_device_state
        megatron_random._set_cuda_rng_state = _no_device_state
        _return_large_blocks()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for one and warn that there is none
    from deepspeed import ops

    # Otherwise the first init_distributed spends more than a minute compiling a collective that gloo replaces.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return True


def _no_device_state(*args: Any, **kwargs: Any) -> None:
    """In place of reading and writing a CUDA generator's state."""


def _return_large_blocks() -> None:
    """Make glibc give tensors of 4 MB and more back to the system when they are freed.

    By itself it raises that limit to 32 MB and keeps activations in a heap that fragments: peaks nearly twice as high
    were measured, at the same speed. Other C libraries have no mallopt, and keep their own ways.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


@contextlib.contextmanager
def cuda_names() -> Iterator[None]:
    """Let Megatron's optimizers and schedules run on the CPU inside the block; nothing happens with an accelerator.

    They name `device="cuda"` in the source, move tensors by `.cuda()`, and compare `Tensor.type()` with the names of
    CUDA's types. A model's own forward pass needs none of it: `plain()` takes these names off its way.
    """
    if not active():
        yield
        return
    synchronize, current_stream = torch.cuda.synchronize, torch.cuda.current_stream
    torch.cuda.synchronize = lambda device=None: None
    # from megatron-core 0.17 on, a reduction of gradients waits for the stream that computed them
    torch.cuda.current_stream = lambda device=None: _NoStream()  # type: ignore[assignment,return-value]
    try:
        with _CudaNames():
            yield
    finally:
        torch.cuda.synchronize, torch.cuda.current_stream = synchronize, current_stream


def install_dispatcher() -> None:
    """Let Megatron's all-to-all dispatcher of experts run on the CPU; nothing happens with an accelerator.

    It copies the numbers of tokens for each rank to the host on a CUDA stream, and torch.distributed wants them as
    numbers: on the CPU there is nothing to copy, and Megatron would leave them tensors.
    """
    if not active():
        return
    kind: Any = releases.all_to_all_dispatcher()

    def splits_as_numbers(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        for name in ("input_splits", "output_splits"):
            if isinstance(value := getattr(self, name), torch.Tensor):
                setattr(self, name, value.tolist())
        return tokens_per_expert

    kind.cuda_dtoh_stream = _NoStream()
    kind._maybe_dtoh_and_synchronize = splits_as_numbers


def plain() -> contextlib.AbstractContextManager[Any]:
    """Turn `cuda_names` off inside the block: looking at every tensor operation takes time."""
    return torch._C.DisableTorchFunction() if active() else contextlib.nullcontext()


class _NoStream:
    """Stands for a CUDA stream where everything is computed in order."""

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> object:
        return event

    def synchronize(self) -> None: ...


class _CudaNames(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's tracker of named random states, on torch's CPU generator.

    Megatron's own fallback for the CPU ignores the names, so that dropout inside tensor-parallel regions would draw
    the same mask on every rank.
    """

    def add(self, name: str, seed: int) -> None:
        """A new named state. Raises ValueError for a name that exists."""
        if name in self.states_:
            raise ValueError(f"random state {name!r}: expected a new name, got one that exists; call reset() first")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the named state inside the block and from the default one again after it."""
        if name not in self.states_:
            raise KeyError(
                f"random state {name!r}: expected one of {', '.join(self.states_)}; call init_parallel first"
            )
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def install_rng_tracker(states: dict[str, int]) -> None:
    """Replace Megatron's tracker by the CPU one with the states `name -> seed`. Only without an accelerator."""
    if not active():
        raise RuntimeError("install_rng_tracker: expected a machine without accelerator; use Megatron's own tracker")
    tracker: Any = CpuRNGStatesTracker()
    for name, seed in states.items():
        tracker.add(name, seed)
    megatron_random._CUDA_RNG_STATE_TRACKER = tracker
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
