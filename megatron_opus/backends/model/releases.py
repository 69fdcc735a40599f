"""The releases of megatron-core, DeepSpeed and torch: which were tested, and what differs between them.

Nothing else in the package knows a release number. Names of theirs that are private, or that came or moved with a
release, are read here alone, each with the release that brought it. `tests/run.sh` and `tests/run.sh --latest` test
the combinations of docs/parallelism.md, "Tested releases".
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from types import ModuleType

from packaging.version import Version

from megatron_opus.errors import Refusal

LOWEST = {"megatron-core": "0.16", "deepspeed": "0.17", "torch": "2.6"}
TESTED = {"megatron-core": ("0.16.1", "0.19.2"), "deepspeed": ("0.19.8",), "torch": ("2.13.0", "2.14.1")}


class UnsupportedRelease(Refusal, RuntimeError):
    """A release of a host that this package cannot work with."""


def installed() -> dict[str, str]:
    """Return package -> installed release, without a local part such as `+cpu`."""
    return {name: Version(importlib.metadata.version(name)).base_version for name in LOWEST}


def check(found: Mapping[str, str]) -> list[str]:
    """Return one line for each release of `found` that was not tested, for the start of a run.

    Raises UnsupportedRelease for one that is too old. Nothing of the hosts is imported, so that this can be asked
    before an import fails.
    """
    lines = []
    for name, release in found.items():
        if Version(release) < Version(LOWEST[name]):
            raise UnsupportedRelease(
                f"{name}: expected {LOWEST[name]} or later, got {release}; install the tested combination: "
                "pip install -c constraints.txt -e ."
            )
        if release not in TESTED[name]:
            lines.append(f"{name} {release}: not tested with megatron_opus; tested: {', '.join(TESTED[name])}")
    return lines


def missing(name: str, wanted: str, remedy: str = "") -> UnsupportedRelease:
    """Make the error for something that the installed release of `name` does not have."""
    return UnsupportedRelease(
        f"{name} {importlib.metadata.version(name)}: expected {wanted}, found none; tested releases: "
        f"{', '.join(TESTED[name])}. Install one of them{remedy}"
    )


# --- megatron-core --------------------------------------------------------------------------------------------------


def megatron_random() -> ModuleType:
    """Return megatron-core's module of random states, whose private names below are the same in 0.16 to 0.19.

    Raises UnsupportedRelease naming what a later release has moved.
    """
    module = importlib.import_module("megatron.core.tensor_parallel.random")
    for name in (
        "CudaRNGStatesTracker",
        "_CUDA_RNG_STATE_TRACKER",
        "_CUDA_RNG_STATE_TRACKER_INITIALIZED",
        "_DATA_PARALLEL_RNG_TRACKER_NAME",
        "_EXPERT_PARALLEL_RNG_TRACKER_NAME",
        "_MODEL_PARALLEL_RNG_TRACKER_NAME",
        "_get_cuda_rng_state",
        "_set_cuda_rng_state",
    ):
        if not hasattr(module, name):
            raise missing("megatron-core", f"{module.__name__}.{name}")
    return module


def generalized_tensor_parallel_size() -> int:
    """Return over how many ranks Megatron cuts each weight beside tensor parallelism; 1 where it does not.

    megatron-core 0.19 brought it (`gtp_remat_size`). Its ranks hold pieces that no shard map here describes.
    """
    from megatron.core import parallel_state

    size = getattr(parallel_state, "get_gtp_weight_remat_world_size", None)
    return max(1, size()) if size is not None else 1  # it answers 0 where there is no such group


def all_to_all_dispatcher() -> type:
    """Return megatron-core's all-to-all dispatcher of experts, whose private names below are the same in 0.16 to 0.19.

    Raises UnsupportedRelease naming what a later release has moved.
    """
    module = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    kind: type = module.MoEAlltoAllTokenDispatcher
    for name in ("cuda_dtoh_stream", "_maybe_dtoh_and_synchronize"):
        if not hasattr(kind, name):
            raise missing("megatron-core", f"MoEAlltoAllTokenDispatcher.{name}")
    return kind


def name_missing_kernels() -> None:
    """Give megatron-core's experts the name of a kernel that 0.16 and 0.17 ask for without Transformer Engine.

    Their router compares `te_general_gemm` with None, a name that only an import of Transformer Engine makes there.
    """
    module = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None  # type: ignore[attr-defined]


# --- DeepSpeed ------------------------------------------------------------------------------------------------------


def deepspeed_muon() -> tuple[ModuleType, ModuleType]:
    """Return DeepSpeed's modules of Muon's functions and of Muon's optimizers.

    The folder came with 0.17.6, the Gram form of Newton-Schulz and the choice between both with 0.19, and the factor
    for a matrix's shape as a function, which is read here, after 0.19.6. Raises UnsupportedRelease for what is older.
    """
    remedy = ", or set optimizer.name=adamw"
    try:
        functions = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
        optimizers = importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ModuleNotFoundError:
        raise missing("deepspeed", "deepspeed.runtime.zero.muon", remedy) from None
    for name in ("_aspect_ratio_scale", "zeropower_via_gram_newtonschulz", "zeropower_via_newtonschulz5"):
        if not hasattr(functions, name):
            raise missing("deepspeed", f"Muon's {name}", remedy)
    return functions, optimizers
