"""Candidates out of Megatron-LM's datasets, opus.yaml, the command line, and what is refused before anything runs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_opus.backends.engines.megatron.training_loop import attended, document_ids_of
from megatron_opus.backends.model.releases import UnsupportedRelease
from megatron_opus.config import ConfigError, ModelConfig, RunConfig, SelectionConfig
from megatron_opus.data.buffer import DrawError
from megatron_opus.data.iterator import IteratorError
from megatron_opus.integrations.megatron_lm.__main__ import main, split
from megatron_opus.integrations.megatron_lm.checks import NAMES, REFUSED, check_arguments, check_names
from megatron_opus.integrations.megatron_lm.record import Record
from megatron_opus.integrations.megatron_lm.run import candidates_of
from megatron_opus.integrations.megatron_lm.samples import CandidateCursor, Samples, SelectedMicroBatches
from megatron_opus.integrations.megatron_lm.settings import load
from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics
from megatron_opus.types import Candidates, Selection, Signals

LENGTH = 4


class Rows:
    """A dataset of Megatron's kind: sample i is filled with i."""

    def __init__(self, size: int, path: str | None = None) -> None:
        self.size, self.dataset_path = size, path

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.full((LENGTH,), index, dtype=torch.int64)
        return {
            "tokens": tokens,
            "labels": tokens + 1,
            "loss_mask": torch.ones(LENGTH),
            "position_ids": torch.arange(LENGTH),
        }


class Blend(Rows):
    """Two datasets, of which the second one gives every third sample."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.datasets, self.weights = [Rows(size, "/data/web"), Rows(size, "/data/code")], [2.0, 1.0]
        self.dataset_index = np.array([0, 0, 1] * size, np.int16)[:size]


def test_candidates_are_the_next_indices_of_the_dataset() -> None:
    """Guards against a cursor that skips samples, offers one twice, or runs off the end of the dataset."""
    cursor = CandidateCursor(Samples(Rows(10), None), seed=1, start=3)
    cursor.size = 4
    assert cursor.draw(0, None).sample_ids.tolist() == [3, 4, 5, 6]
    saved = cursor.state_dict()
    assert cursor.draw(1, None).sample_ids.tolist() == [7, 8, 9, 0]
    assert cursor.passes == 1
    again = CandidateCursor(Samples(Rows(10), None), seed=1, start=0)
    again.load_state_dict(saved)
    again.size = 2  # N may change from step to step
    assert again.draw(1, None).sample_ids.tolist() == [7, 8]
    again.size = 11
    with pytest.raises(DrawError, match="N = 11 candidates a step: the train dataset has 10 samples"):
        again.draw(2, None)


def test_the_datasets_of_a_blend_are_domains() -> None:
    """Guards against floors and shares that act on another dataset than the one that a sample is from."""
    samples = Samples(Blend(30), None)
    assert samples.names == ("web", "code")
    np.testing.assert_allclose(samples.shares, [2 / 3, 1 / 3])
    cursor = CandidateCursor(samples, seed=1, start=0)
    cursor.size = 6
    assert cursor.draw(0, None).domains.tolist() == [0, 0, 1, 0, 0, 1]
    drawn = [cursor.draw(step, torch.tensor([0.5, 0.5])) for step in (1, 2)]
    for candidates in drawn:
        assert np.bincount(candidates.domains).tolist() == [3, 3]
        assert candidates.domains.tolist() == samples.domain_of(candidates.sample_ids).tolist()
    ids = np.concatenate([candidates.sample_ids for candidates in drawn])
    assert len(set(ids.tolist())) == 12  # no dataset offers a sample twice before its end
    assert min(ids) >= 6  # nor again what was offered in the order of the blend
    cursor.size = 24
    with pytest.raises(DrawError, match="code, whose part of the blend has 10 samples"):
        cursor.draw(3, torch.tensor([0.0, 1.0]))


def test_names_that_are_alike_are_told_apart() -> None:
    """Guards against two datasets under one name, whose floors would be one."""
    blend = Blend(6)
    blend.datasets = [Rows(6, "/a/text"), Rows(6, "/b/text")]
    assert Samples(blend, None).names == ("/a/text", "/b/text")
    blend.datasets = [Rows(6, "/a/text"), Rows(6, "/a/text")]
    assert Samples(blend, None).names == ("/a/text#0", "/a/text#1")


def test_the_chosen_are_laid_out_as_megatrons_sampler_does() -> None:
    """Guards against another order of micro-batches, ranks and rows: rho 1 would change every run of two ranks."""
    samples = Samples(Rows(20), None)
    taken = []
    for rank in (0, 1):
        batches = SelectedMicroBatches(dp_rank=rank, dp_size=2)
        views = [batches.view(), batches.view()]
        batches.fill_selection(samples, np.arange(8, 16), 2)
        taken.append([next(views[0])["tokens"][:, 0].tolist() for _ in range(2)])
        assert [next(views[1])["tokens"][:, 0].tolist() for _ in range(2)] == taken[-1]
    assert taken == [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]
    with pytest.raises(IteratorError, match="weights of sequences"):
        batches.fill_selection(samples, np.arange(8), 2, torch.ones(8))


def test_the_target_is_walked_through_before_it_is_shuffled_again() -> None:
    """Guards against ids of the target that mean train samples, or that come twice within one pass."""
    samples = Samples(Rows(10), Rows(6))
    ids = np.concatenate([samples.proxy_ids(step, 2, seed=3) for step in range(3)])
    assert sorted(ids.tolist()) == list(range(10, 16))
    assert samples.batch(ids[:1]).tokens[0, 0] == ids[0] - 10
    with pytest.raises(ConfigError, match="expected at most 6, the sequences of the target, got 7; set"):
        samples.proxy_ids(0, 7, seed=3)


def test_masks_between_documents_survive_the_window() -> None:
    """Guards against scores of sequences that look across documents, where training does not."""
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]], dtype=torch.int32)
    barred = ~attended(documents)
    assert torch.equal(document_ids_of(barred), documents)
    assert torch.equal(barred[0, 0, 3], torch.tensor([True, True, False, False, True]))
    plain = ~torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert document_ids_of(plain).tolist() == [[0, 0, 0]]


def test_candidates_of_a_step() -> None:
    """Guards against an N that ranks cannot share, or below K."""
    assert candidates_of(8, 0.5, 2) == 16
    assert candidates_of(8, 0.3, 2) == 26
    assert candidates_of(8, 1.0, 4) == 8
    assert candidates_of(6, 0.99, 4) == 8


def test_an_evaluation_is_added_to_the_row_of_its_step(tmp_path: Path) -> None:
    """Guards against validation losses that are lost, or that stand in a row of their own, taken for another step."""
    config = RunConfig(name="opus", model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
    candidates = Candidates(step=0, sample_ids=np.arange(2), domains=np.zeros(2, np.int32))
    decided = (candidates, Signals(), Selection(indices=torch.tensor([1])))
    record = Record(tmp_path, config, ("web",), first_step=0)
    record.evaluated({"lm loss": 9.0})  # before the first step, as of a checkpoint: there is no row for it
    record.step({"step": 0, "loss": 2.0}, decided, None)
    record.sync()
    record.evaluated({"lm loss": 3.0})
    record.close()
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 2.0, "validation_loss": {"lm loss": 3.0}}]
    assert read_ledger(tmp_path / "ledger")["selected"].to_pylist() == [False, True]


# --- settings and command line ----------------------------------------------------------------------------------------


def test_opus_yaml(tmp_path: Path) -> None:
    """Guards against a setting that is misread, or one of ours that Megatron-LM's loop cannot carry out."""
    file = tmp_path / "opus.yaml"
    file.write_text("selection: {rho: 0.25}\nproxy: {prefix: /data/target}\n")
    assert (load(file).selection.rho, load(file).proxy.prefix) == (0.25, "/data/target")
    for text, error in (
        ("selection: {roh: 0.25}", r"unknown key selection.roh; did you mean selection.rho\? \(in "),
        ("training: {}", "unknown key training"),
        ("selection: {strategy: filter_then_weight}", "that gives no weights to losses"),
        ("selection: {scope: rank_local}", "selection.scope: expected global"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=error):
            load(file)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against arguments of the user's script that are lost or changed."""
    script = tmp_path / "pretrain_gpt.py"
    script.touch()
    words = [str(script), "--lr", "1", "--opus-config", "a.yaml", "--bf16"]
    assert split(words) == (str(script), ["--lr", "1", "--bf16"], "a.yaml")
    assert split([str(script), "--opus-config=a.yaml"]) == (str(script), [], "a.yaml")
    for words, error in (
        ([str(script), "--bf16"], "--opus-config: expected a file, got none"),
        (["nothing.py", "--opus-config", "a.yaml"], "expected a Megatron-LM script first, got nothing.py"),
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        assert error in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------------------------

FINE = {
    **{"seq_length": 32, "sequence_parallel": False, "tensor_model_parallel_size": 2},
    **{"cuda_graph_impl": "none", "dataloader_type": "single", "context_parallel_size": 1},
}


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"iterations_to_skip": [7]}, r"--iterations-to-skip \[7\].*leave it out"),
        ({"use_legacy_models": True}, "--use-legacy-models"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local.*use --cuda-graph-impl none"),
        ({"enable_cuda_graph": True}, "--enable-cuda-graph"),
        ({"external_cuda_graph": True}, "--external-cuda-graph"),
        ({"optimizer_cuda_graph": True}, "--optimizer-cuda-graph"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"gtp_weight_remat_size": 2}, "generalised tensor parallelism.*--tensor-model-parallel-size"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
        ({"fp8": "hybrid"}, "--fp8-format.*use --bf16"),
        ({"fp4": "nvfp4"}, "--fp4-format.*use --bf16"),
        ({"fp16": True}, "--fp16.*use --bf16"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"delay_wgrad_compute": True}, "--delay-wgrad-compute"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer"),
        ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload"),
        ({"num_distributed_optimizer_instances": 2}, "--num-distributed-optimizer-instances"),
        ({"dataloader_type": "cyclic"}, "--dataloader-type cyclic.*use --dataloader-type single"),
        ({"sft": True}, "--sft"),
        ({"dataloader_inter_document_masking": True}, "--dataloader-inter-document-masking"),
        ({"non_persistent_ckpt_type": "local"}, "--non-persistent-ckpt-type local.*use --save-interval"),
        ({"phase_transition_iterations": [2]}, "--phase-transition-iterations"),
        ({"multiple_validation_sets": True}, "--multiple-validation-sets"),
        ({"perform_rl_step": True}, "--perform-rl-step"),
        ({"vision_pretraining": True}, "--vision-pretraining"),
        ({"context_parallel_size": 4, "seq_length": 36}, r"a multiple of 2 x --context-parallel-size \(8\), got 36"),
        ({"sequence_parallel": True, "seq_length": 31}, "multiple of --tensor-model-parallel-size"),
    ],
)
def test_an_argument_that_cannot_be_scored_is_refused(changed: dict[str, Any], error: str) -> None:
    """Guards against a run whose scores are wrong, or whose batches nothing selected, with no word about it."""
    check_arguments(Namespace(**FINE), SelectionConfig())
    with pytest.raises(ConfigError, match=error):
        check_arguments(Namespace(**{**FINE, **changed}), SelectionConfig())


def test_every_refusal_has_a_case_above() -> None:
    """Guards against a refusal that nobody has seen refuse."""
    cases = test_an_argument_that_cannot_be_scored_is_refused.pytestmark[0].args[1]  # type: ignore[attr-defined]
    for used, found, _ in REFUSED:
        assert any(used(Namespace(**{**FINE, **changed})) for changed, _ in cases), found


def test_a_release_with_other_functions_is_refused() -> None:
    """Guards against wrapping a function that takes, or gives, something else than what is relied on."""
    training: Any = ModuleType("megatron.training.training")

    def takes(names: tuple[str, ...]) -> Any:
        found: dict[str, Any] = {}
        exec(f"def function({', '.join(names)}): ...", found)
        return found["function"]

    for name, names in NAMES.items():
        setattr(training, name, takes((*names, "more=None")))
    check_names(training)
    training.train_step = takes(("forward_step_func", "model"))
    with pytest.raises(UnsupportedRelease, match=r"expected .*train_step\(forward_step_func, data_iterator"):
        check_names(training)
    del training.train_step
    with pytest.raises(UnsupportedRelease, match="found no such name; tested releases: "):
        check_names(training)


def test_a_train_dataset_that_only_some_ranks_have_is_refused() -> None:
    """Guards against ranks that cannot read the candidates they are to score."""
    from megatron_opus.integrations.megatron_lm.selector import Selector

    config: Any = SimpleNamespace(selection=SelectionConfig(rho=0.5), proxy=SimpleNamespace(prefix=None))
    selector = Selector(config)
    assert selector.train_samples(100, steps=10) == 210
    with pytest.raises(ConfigError, match="the train dataset: expected one on every rank"):
        selector.take(None, None)
