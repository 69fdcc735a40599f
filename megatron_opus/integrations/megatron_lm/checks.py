"""What is looked at before anything is built: names of Megatron-LM that are wrapped, and arguments it was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from megatron_opus.backends.engines.megatron.training_loop import megatron_version
from megatron_opus.backends.model.releases import UnsupportedRelease
from megatron_opus.config import ConfigError, SelectionConfig

TESTED = ("0.16.1", "0.18.2", "0.19.2", "0.20.0")
# Every name of megatron.training.training that is wrapped or called, with the arguments that are relied on.
NAMES: Mapping[str, tuple[str, ...]] = {
    "setup_model_and_optimizer": (),
    "get_train_valid_test_num_samples": (),
    "build_train_valid_test_datasets": ("build_train_valid_test_datasets_provider",),
    "build_pretraining_data_loader": ("dataset", "consumed_samples"),
    "train_step": ("forward_step_func", "data_iterator", "model", "optimizer"),
    "evaluate": ("forward_step_func", "data_iterator", "model"),
    "evaluate_and_print_results": ("prefix", "forward_step_func", "data_iterator", "model"),
    "save_checkpoint": ("iteration", "model", "optimizer"),
    "load_checkpoint": ("ddp_model", "optimizer"),
    "get_args": (),
    "get_tensorboard_writer": (),
}


def check_names(training: ModuleType) -> None:
    """Raise UnsupportedRelease for a name that is missing from `training` or takes other arguments first."""
    for name, expected in NAMES.items():
        function = getattr(training, name, None)
        found = None if function is None else tuple(inspect.signature(function).parameters)
        if found is None or found[: len(expected)] != expected:
            wanted = f"{name}({', '.join((*expected, '...'))})"
            got = "no such name" if found is None else f"{name}({', '.join(found)})"
            raise UnsupportedRelease(
                f"Megatron-LM {megatron_version}: expected {training.__name__}.{wanted}, found {got}; tested releases: "
                f"{', '.join(TESTED)}. Train with one of them, or without --opus-config"
            )


# --- arguments ------------------------------------------------------------------------------------------------------

# Of each refused argument: whether the run uses it, what was found, and what to change.
_Refused = tuple[Callable[[Any], bool], str, str]


def _given(name: str) -> Callable[[Any], bool]:
    return lambda arguments: bool(getattr(arguments, name, None))


def _more_than(name: str, number: int) -> Callable[[Any], bool]:
    return lambda arguments: (getattr(arguments, name, None) or 0) > number


def _other_than(name: str, *values: Any) -> Callable[[Any], bool]:
    return lambda arguments: getattr(arguments, name, values[0]) not in values


REFUSED: tuple[_Refused, ...] = (
    (
        _given("iterations_to_skip"),
        "--iterations-to-skip {iterations_to_skip}: a skipped iteration takes batches that nothing selected",
        "leave it out, and the tracker file of --rerun-mode too",
    ),
    (_given("use_legacy_models"), "--use-legacy-models: their layers are not megatron.core's", "leave it out"),
    (
        _other_than("cuda_graph_impl", "none", None),
        "--cuda-graph-impl {cuda_graph_impl}: a graph runs no hooks, by which scores are read",
        "use --cuda-graph-impl none",
    ),
    (_given("enable_cuda_graph"), "--enable-cuda-graph: a graph runs no hooks", "leave it out"),
    (_given("external_cuda_graph"), "--external-cuda-graph: a graph runs no hooks", "leave it out"),
    (_given("optimizer_cuda_graph"), "--optimizer-cuda-graph: its state is not readable between steps", "leave it out"),
    (_given("use_megatron_fsdp"), "--use-megatron-fsdp: weights are cut in a way that is not scored", "leave it out"),
    (_given("use_torch_fsdp2"), "--use-torch-fsdp2: weights are cut in a way that is not scored", "leave it out"),
    (
        _more_than("gtp_weight_remat_size", 1),
        "generalised tensor parallelism: the scores of weights that it cuts are not known",
        "use --tensor-model-parallel-size",
    ),
    (_given("hybrid_context_parallel"), "--hybrid-context-parallel", "leave it out"),
    (_given("fp8"), "--fp8-format: scoring would disturb the scales of fp8", "use --bf16"),
    (_given("fp4"), "--fp4-format: scoring would disturb the scales of fp4", "use --bf16"),
    (_given("fp16"), "--fp16: gradients of activations would underflow without its loss scale", "use --bf16"),
    (_more_than("mtp_num_layers", 0), "--mtp-num-layers: its losses are not scored", "leave it out"),
    (_given("delay_wgrad_compute"), "--delay-wgrad-compute: it changes how layers run backward", "leave it out"),
    (_given("overlap_moe_expert_parallel_comm"), "--overlap-moe-expert-parallel-comm", "leave it out"),
    (
        _given("use_precision_aware_optimizer"),
        "--use-precision-aware-optimizer: its state is not read",
        "leave it out",
    ),
    (_given("optimizer_cpu_offload"), "--optimizer-cpu-offload: its state is not read", "leave it out"),
    (
        _more_than("num_distributed_optimizer_instances", 1),
        "--num-distributed-optimizer-instances: their state is not read",
        "use 1",
    ),
    (
        _other_than("dataloader_type", "single", None),
        "--dataloader-type {dataloader_type}: candidates are offered in the order of the dataset",
        "use --dataloader-type single",
    ),
    (_given("sft"), "--sft: packed sequences are not scored one by one", "leave it out"),
    (
        _given("dataloader_inter_document_masking"),
        "--dataloader-inter-document-masking: packed sequences are not scored one by one",
        "use --reset-attention-mask",
    ),
    (
        _given("non_persistent_ckpt_type"),
        "--non-persistent-ckpt-type {non_persistent_ckpt_type}: our state would not lie beside such checkpoints",
        "use --save-interval",
    ),
    (_given("phase_transition_iterations"), "--phase-transition-iterations: its datasets begin anew", "leave it out"),
    (_given("multiple_validation_sets"), "--multiple-validation-sets", "leave it out"),
    (_given("perform_rl_step"), "--perform-rl-step: there is no pre-training dataset to select from", "leave it out"),
    (_given("vision_pretraining"), "--vision-pretraining: sequences of tokens are selected", "leave it out"),
)


def check_arguments(arguments: Any, selection: SelectionConfig) -> None:
    """Raise ConfigError for what cannot be scored in this run, with the argument to change."""
    for used, found, remedy in REFUSED:
        if used(arguments):
            raise ConfigError(f"{found.format(**vars(arguments))}; OPUS cannot select in such a run: {remedy}")
    length = min(selection.score_length, arguments.seq_length)
    if (cp := arguments.context_parallel_size) > 1 and length % (2 * cp):
        raise ConfigError(
            f"selection.score_length: expected a multiple of 2 x --context-parallel-size ({2 * cp}), got {length}"
        )
    if arguments.sequence_parallel and length % arguments.tensor_model_parallel_size:
        raise ConfigError(
            f"selection.score_length: expected a multiple of --tensor-model-parallel-size "
            f"({arguments.tensor_model_parallel_size}) with --sequence-parallel, got {length}"
        )
