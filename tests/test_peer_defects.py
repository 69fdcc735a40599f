"""Defects seen in other implementations of online data selection, and the tests here that fail when one is put back.

The table is kept by a test: an entry that names a test which no longer exists fails. Tests that have no better place
stand below it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from small_models import TinyGPT, random_batch, token_losses

from megatron_opus import build_scorer
from megatron_opus.config import SelectionConfig, SketchConfig
from megatron_opus.selection import sketch

TESTS = Path(__file__).resolve().parent

GUARDS: dict[str, tuple[str, ...]] = {
    "1 labels are shifted twice: the score is that of predicting token t + 2": (
        "scoring/test_scoring_pass.py::test_scores_agree_with_the_oracle",
        "scoring/test_sharded.py::test_unsharded_scores_agree_with_the_oracle",
        "data/test_corpus.py::test_labels_are_shifted_once",
    ),
    "2 a row-sharded second moment is used as if it were the whole matrix": (
        "scoring/test_zero.py::test_partitioned_state_gives_the_replicated_scores",
        "scoring/test_sharded.py::test_sharded_scores_are_the_unsharded_ones",
        "selection/test_precondition.py::test_fragments_that_cut_rows_add_up",
    ),
    "3 Muon's momentum exists on one rank only: the others score that layer with the identity and without its rate": (
        "scoring/test_muon_geometry.py::test_muon_geometry_agrees_with_the_oracle",
        "scoring/test_zero.py::test_every_geometry_agrees_with_the_oracle",
        "scoring/test_zero.py::test_every_zero_stage_gives_the_unpartitioned_scores",
        "selection/test_precondition.py::test_the_muon_multiplier_is_the_polynomial_of_the_momentum",
    ),
    "4 a capture that yields no gradients scores everything zero: selection is silently uniform": (
        "scoring/test_scoring_pass.py::test_what_cannot_be_scored_raises",
        "selection/test_sampling.py::test_equal_utilities_fall_back_and_say_so",
        "training/test_driver.py::test_fallbacks_are_counted_said_and_bounded",
    ),
    "5 another attention pattern in scoring than in training; candidate loss masks ignored": (
        "scoring/test_sharded.py::test_unsharded_scores_agree_with_the_oracle",
        "scoring/test_scoring_pass.py::test_scores_agree_with_the_oracle",
        "training/test_excluded.py::test_a_sequence_without_a_counting_token_in_its_window_is_excluded",
    ),
    "6 hashes by local size and layer order: another sharding gives other sketches": (
        "selection/test_sketch.py::test_shards_add_up",
        "scoring/test_sharded.py::test_sharded_scores_are_the_unsharded_ones",
        "training/test_run.py::test_tensor_parallel_makes_the_same_selections",
    ),
    "7 one rank scores all candidates while the others idle": (
        "scoring/test_sharded.py::test_every_rank_scores_its_own_share",
        "training/test_driver.py::test_a_proxy_smaller_than_the_ranks_is_filled_up",
    ),
    "8 unseeded sampling; no position and no generator in the checkpoint": (
        "selection/test_sampling.py::test_draws_are_distinct_and_deterministic",
        "training/test_kill_resume.py::test_killed_runs_resume_exactly",
        "training/test_rank_local.py::test_a_resumed_run_draws_the_same",
        "ranks/test_stopping.py::test_a_signal_to_one_rank_stops_all_with_a_checkpoint",
    ),
    "9 a host synchronisation per parameter; every candidate gradient formed two or three times": (
        "scoring/test_scoring_pass.py::test_host_synchronisations_do_not_grow_with_layers",
        "selection/test_sampling.py::test_draws_never_wait_for_a_device",
        "test_peer_defects.py::test_every_candidate_gradient_is_formed_once",
    ),
}


@pytest.mark.parametrize("defect", GUARDS, ids=lambda text: text.split()[0])
def test_every_defect_is_guarded(defect):
    """Fault: a guard that was renamed or removed, so that nobody notices the defect when it comes back."""
    for guard in GUARDS[defect]:
        file, name = guard.split("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert any(f.name == name for f in functions), f"{guard} does not exist; {defect}"


@pytest.mark.parametrize("size", [None, 3])
def test_every_candidate_gradient_is_formed_once(monkeypatch, size):
    """Fault: the gradient of each candidate is formed once for its alignment and again for its interactions (defect 9).
    The operator that forms whole gradients sees every candidate once in every layer, and the proxy as one gradient for
    each of its micro-batches; the model runs forward once for each micro-batch."""
    seen: list[int] = []
    features = sketch.Materialise.features

    def counted(self, kept, projected, multiplier=None):
        seen.append(kept.shape[0])
        return features(self, kept, projected, multiplier)

    monkeypatch.setattr(sketch.Materialise, "features", counted)
    model = TinyGPT(layers=1)
    config = SelectionConfig(
        score_micro_batch_size=size, sketch=SketchConfig(operator="materialise", dim=256, alignment="features")
    )
    optimizer = torch.optim.AdamW(model.parameters())
    scorer = build_scorer(model, optimizer, config=config, token_losses=token_losses, verify=False)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    scorer(random_batch(6), random_batch(2, seed=1))
    layers = len(scorer.layers)
    assert len(forwards) == (2 if size is None else 3)
    assert sum(seen) == layers * (6 + 1)
