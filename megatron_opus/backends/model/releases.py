"""The releases of megatron-core, DeepSpeed and torch: which were tested, and what differs between them.

Nothing else in the package knows a release number. Names of theirs that are private, or that came or moved with a
release, are read here alone, each with the release that brought it. `tests/run.sh` and `tests/run.sh --latest` test
the combinations of docs/parallelism.md, "Tested releases".
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from packaging.version import Version

from megatron_opus.errors import Refusal

LOWEST = {"megatron-core": "0.16", "deepspeed": "0.17", "torch": "2.6"}
TESTED = {
    "megatron-core": ("0.16.1", "0.17.1", "0.18.2", "0.19.2"),
    "deepspeed": ("0.19.8",),
    "torch": ("2.13.0", "2.14.1"),
}


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
        f"{', '.join(TESTED.get(name, ('those of docs/parallelism.md',)))}. Install one of them{remedy}"
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


def megatron_muon() -> ModuleType:
    """Return megatron-core's module of Muon (`TensorParallelMuon`, `get_muon_scale_factor`).

    The module came with 0.18, which wants Python 3.12; releases before it had Muon's numbers under other names. It
    needs NVIDIA's package `emerging-optimizers`. Raises UnsupportedRelease where one of the two is not there.
    """
    remedy = (
        " (0.19.2 on Python 3.12 or later has it; pip install megatron-core==0.19.2 emerging-optimizers), or set "
        "optimizer.name=adamw, or parallel.engine=deepspeed, which has a Muon of its own"
    )
    try:
        module = importlib.import_module("megatron.core.optimizer.emerging_optimizers")
    except ModuleNotFoundError:
        raise missing("megatron-core", "megatron.core.optimizer.emerging_optimizers, its Muon", remedy) from None
    if not module.HAVE_EMERGING_OPTIMIZERS:
        raise missing("megatron-core", "the package emerging-optimizers, which its Muon needs", remedy)
    for name in ("TensorParallelMuon", "get_muon_scale_factor"):
        if not hasattr(module, name):
            raise missing("megatron-core", f"{module.__name__}.{name}", remedy)
    return module


def muon_coefficients(name: str, steps: int) -> tuple[tuple[float, float, float], ...]:
    """Return (a, b, c) of each of `steps` Newton-Schulz steps of Megatron's Muon, for a set of coefficients by name.

    emerging-optimizers keeps the sets in a private table (the same in 0.2 and 0.3), and says which of them repeat their
    last triple, where the others begin anew, only inside its function. Raises UnsupportedRelease.
    """
    utils = importlib.import_module("emerging_optimizers.orthogonalized_optimizers.muon_utils")
    sets = getattr(utils, "_COEFFICIENT_SETS", {})
    if name not in sets:
        raise missing("emerging-optimizers", f"the Newton-Schulz coefficients {name!r} among {sorted(sets)}")
    constants = inspect.unwrap(utils.newton_schulz).__code__.co_consts
    repeating = [c for c in constants if isinstance(c, tuple) and c and all(x in sets for x in c)]
    if len(repeating) != 1:
        raise missing("emerging-optimizers", "one list of coefficients that repeat their last triple")
    mode = "repeat_last" if name in repeating[0] else "cycle"
    return tuple(tuple(x) for x in utils.get_coefficient_iterator(steps, sets[name], mode=mode))


def torch_dist_strategies() -> ModuleType:
    """Return megatron-core's module that writes `torch_dist` checkpoints.

    Its parts below, private ones among them, are the same in 0.16 to 0.19. Raises UnsupportedRelease naming what a
    later release has moved.
    """
    module = importlib.import_module("megatron.core.dist_checkpointing.strategies.torch")
    for name in (
        "MCoreSavePlanner",
        "TorchDistSaveShardedStrategy",
        "_replace_state_dict_keys_with_sharded_keys",
        "mcore_to_pyt_state_dict",
    ):
        if not hasattr(module, name):
            raise missing("megatron-core", f"{module.__name__}.{name}")
    return module


def distributed_optimizer() -> Any:
    """Return megatron-core's DistributedOptimizer, whose private methods below are the same in 0.16 to 0.19.

    Beside them its `model_param_group_index_map`, `model_param_gbuf_map`, `gbuf_ranges` and `buffers` say what a rank
    owns. Raises UnsupportedRelease naming what a later release has moved.
    """
    found = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    for name in (
        "_get_main_param_and_optimizer_states",
        "_get_model_param_range_map",
        "_set_main_param_and_optimizer_states",
    ):
        if not hasattr(found, name):
            raise missing("megatron-core", f"DistributedOptimizer.{name}")
    return found


def layer_wise_optimizer() -> type | None:
    """Return Megatron's LayerWiseDistributedOptimizer; None before 0.16, which brought it.

    From 0.18 on it has two layouts: one chosen from the layout of the gradient buffers (`compute_full_param_layout`,
    `tag_params_for_buffer_routing`), and the older one that deals parameters out by size.
    """
    try:
        module = importlib.import_module("megatron.core.optimizer.layer_wise_optimizer")
    except ModuleNotFoundError:
        return None
    return module.LayerWiseDistributedOptimizer


def tag_for_layer_wise(pieces: Sequence[Any]) -> None:
    """Mark the parameters that a layer-wise optimizer takes, for the layout of the gradient buffers (0.18)."""
    importlib.import_module("megatron.core.optimizer.layer_wise_optimizer").tag_params_for_buffer_routing(pieces)


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
