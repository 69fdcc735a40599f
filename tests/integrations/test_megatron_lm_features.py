"""What else a Megatron-LM run may use while it selects: blends, ramp-up, reruns, signals, asynchronous checkpoints.

Everything goes through `megatron.training.pretrain` of the wheel, on gloo.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_lm_runs import SELECTION, SPLIT, VOCABULARY, LoopRuns, Outcome, loop_runs

from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.metrics import read_metrics

OPUS = {"selection": SELECTION}
ALL = {"selection": {**SELECTION, "rho": 1.0}}
MORE: dict[str, tuple[int, tuple[str, ...]]] = {
    "recompute": (
        1,
        ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    ),
    "muon": (1, ("--optimizer", "muon")),
    "experts": (
        2,
        (
            *("--num-experts", "4", "--moe-router-topk", "2", "--expert-model-parallel-size", "2"),
            *("--moe-token-dispatcher-type", "allgather", "--moe-aux-loss-coeff", "0.01"),
        ),
    ),
    "virtual": (
        2,
        ("--num-layers", "4", "--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopRuns]:
    yield from loop_runs(tmp_path_factory.mktemp("megatron_lm_features"))


@pytest.fixture(scope="module")
def corpora(runs: LoopRuns) -> dict[str, str]:
    """Indexed datasets: two to blend, and a target. Name -> prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng, prefixes = np.random.default_rng(0), {}
    for name, stride in (("web", 0), ("code", 1), ("target", 1)):
        prefix = runs.root / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for _ in range(120):
            length = int(rng.integers(20, 60))
            text = np.arange(length) * stride + rng.integers(0, VOCABULARY) if stride else rng.integers(0, 127, length)
            builder.add_document(np.append(text % VOCABULARY, VOCABULARY), [length + 1])
        builder.finalize(f"{prefix}.idx")
        prefixes[name] = str(prefix)
    return prefixes


@pytest.fixture(scope="module")
def blended(runs: LoopRuns, corpora: dict[str, str]) -> Outcome:
    """A run with everything that belongs to data: blend, floors, target, masks, ramp-up, evaluation, TensorBoard."""
    opus = {
        "selection": {**SELECTION, "floors": {"minimum": {"web": 0.5}}},
        "proxy": {"prefix": corpora["target"]},
    }
    return runs.run(
        "blended",
        *("--eval-interval", "2", "--save-interval", "2", "--async-save"),
        *("--tensorboard-dir", str(runs.root / "events"), "--reset-attention-mask", "--reset-position-ids"),
        *("--eod-mask-loss", "--ckpt-format", "torch_dist", "--lr-warmup-samples", "0"),
        opus=opus,
        data=("--data-path", "0.4", corpora["web"], "0.6", corpora["code"], *SPLIT),
        length=("--train-samples", "16", "--lr-decay-samples", "16"),
        batch=("--step-batch-size-schedule", "0:2 128:4"),  # from 128 tokens on, 4 sequences a step
    )


def test_k_follows_a_ramp_up(blended: Outcome) -> None:
    """Guards against a K of the whole run where Megatron raises the batch size while it goes on."""
    drawn = blended.drawn()
    assert [len(ids) for ids in drawn.values()] == [2, 2, 4, 4, 4]
    table = read_ledger(blended.folder / "opus" / "ledger")
    offered = np.bincount(table["step"].to_numpy())
    assert offered.tolist() == [4, 4, 8, 8, 8]
    assert table["sample_id"].to_pylist() == list(range(32))  # each sample is offered once, in the dataset's order
    assert "consumed samples:           16" in blended.log  # trained samples, as without selection


def test_the_datasets_of_a_blend_are_domains_with_floors(blended: Outcome) -> None:
    """Guards against floors that act on nothing, or on another dataset."""
    table = read_ledger(blended.folder / "opus" / "ledger")
    names = np.array(table["domain"].to_pylist())
    assert set(names) == {"web", "code"}
    chosen, steps = table["selected"].to_numpy(), table["step"].to_numpy()
    for step, k in enumerate((2, 2, 4, 4, 4)):
        web = (names == "web") & (steps == step)
        assert (web & chosen).sum() >= min(k // 2, web.sum())
    # the target counts with the stride of `code`: only the floor keeps `web` in
    assert (names[chosen] == "code").mean() >= 0.4


def test_metrics_tensorboard_and_report(blended: Outcome, runs: LoopRuns, tmp_path: Path) -> None:
    """Guards against a run that leaves nothing to look at."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megatron_opus.report.page import write_report

    rows = blended.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [step for step, row in enumerate(rows) if "validation_loss" in row] == [1, 3, 4]
    assert rows[3]["update_tokens"] == 12 * 32
    for iteration, (loss, norm) in blended.steps.items():
        if iteration != 2:  # where Megatron prints the mean of two steps, after a start
            assert rows[iteration - 1]["loss"] == pytest.approx(float(loss), rel=1e-6)
        assert rows[iteration - 1]["grad_norm"] == pytest.approx(float(norm), abs=1e-3)
    events = EventAccumulator(str(runs.root / "events"))
    events.Reload()
    written = {tag: events.Scalars(tag) for tag in ("opus/entropy_ratio", "opus/selected_share/web", "lm loss")}
    assert [event.step for event in written["opus/entropy_ratio"]] == [1, 2, 3, 4, 5]
    page = tmp_path / "report.html"
    write_report([blended.folder / "opus"], page, command="report")
    assert "web" in page.read_text()


def test_an_asynchronous_checkpoint_has_our_state(blended: Outcome) -> None:
    """Guards against asynchronous saves, and saves at a change of the batch size, that our state is not written for."""
    assert (blended.folder / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert {path.name for path in (blended.folder / "opus").glob("*.pt")} >= {f"iter_000000{i}.pt" for i in (2, 4, 5)}


def test_ado_learns_from_losses_of_all_ranks(runs: LoopRuns, corpora: dict[str, str]) -> None:
    """Guards against losses of sequences that are mixed up between micro-batches, ranks and stages."""
    opus = {
        "selection": {
            **SELECTION,
            "strategy": "ado",
            "ado": {"enabled": True, "skip_steps": 0, "first_fit": 9, "refit_every": 2, "block_steps": 1},
        },
    }
    data = ("--data-path", "0.5", corpora["web"], "0.5", corpora["code"], *SPLIT)
    length = ("--train-iters", "12")
    common = runs.run("ado_common", "--ckpt-format", "torch_dist", "--exit-interval", "1", data=data, length=length)
    more = ("--load", str(common.folder), "--ckpt-format", "torch_dist")
    one = runs.run("ado_one", *more, opus=opus, data=data, length=length)
    two = runs.run("ado_dp2", *more, world=2, opus=opus, data=data, length=length)
    pipe = ("--pipeline-model-parallel-size", "2")
    stages = runs.run("ado_pp2", *more, *pipe, world=2, opus=opus, data=data, length=length)
    context = runs.run("ado_cp2", *more, "--context-parallel-size", "2", world=2, opus=opus, data=data, length=length)
    assert two.drawn() == one.drawn()
    assert stages.drawn() == one.drawn()
    assert context.drawn() == one.drawn()
    last = one.metrics()[-1]
    assert last["ado_fitted"] > 0
    for other in (two, stages, context):
        share = other.metrics()[-1]["ado_share/code"]
        assert share == pytest.approx(last["ado_share/code"], rel=1e-4)


@pytest.mark.parametrize("strategy", ["low_ppl", "random", "greats"])
def test_other_strategies(runs: LoopRuns, strategy: str) -> None:
    """Guards against a strategy that the loop cannot feed: one that needs losses alone, or nothing."""
    outcome = runs.run(strategy, opus={"selection": {**SELECTION, "strategy": strategy}})
    assert [len(ids) for ids in outcome.drawn().values()] == [4, 4, 4, 4]


BANDIT = {"enabled": True, "move_every": 4}
MOVED: dict[str, dict[str, Any]] = {
    "controlled": {
        "controller": {"enabled": True, "window": 2, "probe_first": 2, "cost": 99.0},  # it never pays
        "prefilter": {"pool_ratio": 2, "columns": 1024},
        "domain_bandit": BANDIT,
    },
    "picked": {
        "strategy": "random",
        "rho": 1.0,
        "prefilter": {"pool_ratio": 4, "columns": 1024, "every_step": True},
        "domain_bandit": {**BANDIT, "move_every": 2},
    },
}


@pytest.mark.parametrize("kind", MOVED)
def test_controller_prefilter_and_bandit(runs: LoopRuns, corpora: dict[str, str], kind: str) -> None:
    """Guards against what moves buffer and scoring being given other numbers on two ranks, or after a resume."""
    opus = {"selection": {**SELECTION, **MOVED[kind]}}
    data = ("--data-path", "0.5", corpora["web"], "0.5", corpora["code"], *SPLIT)
    more: dict[str, Any] = {"opus": opus, "data": data, "length": ("--train-iters", "8")}
    one = runs.run(f"{kind}_one", "--save-interval", "3", **more)
    two = runs.run(f"{kind}_two", world=2, **more)
    folder = runs.root / f"{kind}_again"
    shutil.copytree(one.folder, folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    again = runs.run(f"{kind}_again", "--load", str(folder), **more)
    rows = one.metrics()
    assert {"prefilter_gain" in row for row in rows} == {False, True}  # of steps that were scored
    if kind == "controlled":
        assert {row["controller_scoring"] for row in rows} == {0.0, 1.0}
    else:
        assert all("prefilter_seconds" in row for row in rows)
        assert {row["prefilter_picks"] for row in rows if "prefilter_gain" not in row} == {0.0, 1.0}
    assert rows[0]["bandit_share/code"] == 0.5 != rows[-1]["bandit_share/code"]
    assert two.drawn() == one.drawn()
    assert again.drawn() == one.drawn()
    table = read_ledger(one.folder / "opus" / "ledger")
    n = {"controlled": 8, "picked": 4}[kind]  # of a pool of twice or four times as many
    assert np.bincount(table["step"].to_numpy()).tolist() == [n] * 8
    assert max(table["sample_id"].to_pylist()) > 64  # which Megatron was asked for
    assert "; the prefilter picks them from" in one.first_log + one.log


def test_a_step_that_is_run_again_trains_on_the_same_sequences(runs: LoopRuns) -> None:
    """Guards against a rerun that scores or draws anew: here every step but the first is taken twice."""
    again = ("--error-injection-rate", "1", "--error-injection-type")
    plain = runs.run("plain", "--rerun-mode", "disabled", opus=OPUS)
    twice = runs.run("twice", "--no-check-for-nan-in-loss-and-grad", *again, "transient_error", opus=OPUS)
    assert twice.log.count("Possible transient error") == 3
    assert twice.drawn() == plain.drawn()
    assert twice.steps == plain.steps
    # an error that stays breaks the step off before its update: status 16, with a checkpoint of what was before it
    broken = runs.run("broken", *again, "persistent_error", opus=OPUS, expected=16)
    assert set(broken.drawn()) == {0}
    load = ("--load", str(broken.folder), "--rerun-mode", "disabled")
    resumed = runs.run("broken", *load, opus=OPUS)
    assert resumed.drawn() == plain.drawn()
    assert [row["loss"] for row in resumed.metrics()] == [row["loss"] for row in plain.metrics()]


@pytest.mark.parametrize("kind", MORE)
def test_with_rho_1_nothing_changes(runs: LoopRuns, kind: str) -> None:
    """Guards against scoring that disturbs what few runs use: recomputed layers, Muon's momentum, experts, and batches
    that virtual stages take from one another."""
    world, arguments = MORE[kind]
    alone = runs.start(f"alone_{kind}", *arguments, world=world)
    hooked = runs.run(f"hooked_{kind}", *arguments, world=world, opus=ALL)
    assert runs.finish(alone).steps == hooked.steps
    assert np.isfinite(hooked.alignments()).all()


def test_selecting_nothing_costs_little(runs: LoopRuns) -> None:
    """Guards against a hook that a run pays for without selecting: less than 1% of a step, reading included."""
    larger = ("--hidden-size", "128", "--seq-length", "256", "--max-position-embeddings", "256")
    opus = {"selection": {"strategy": "random", "rho": 1.0}}
    length, batch = ("--train-iters", "24"), ("--global-batch-size", "16", "--micro-batch-size", "4")
    outcome = runs.run("nothing", *larger, opus=opus, length=length, batch=batch)
    # the smallest of each, since whatever else the machine does can only add to them
    choosing, step = (min(row[name] for row in outcome.metrics()) for name in ("choose_seconds", "step_seconds"))
    share = choosing / step
    print(f"choosing nothing takes {share:.4f} of a step of {step:.2f} s")
    assert share < 0.01


def test_a_signal_ends_a_run_which_resumes(runs: LoopRuns) -> None:
    """Guards against a checkpoint on a signal that lacks the choices made since the last regular one."""
    length = ("--train-iters", "40")
    started = runs.start("signalled", "--exit-signal-handler", opus=OPUS, length=length)
    folder, launched = started
    launched.reach(lambda: len(read_metrics(folder / "opus")) >= 2)
    launched.signal(0, signal.SIGTERM)
    stopped = runs.finish(started)
    done = int((folder / "latest_checkpointed_iteration.txt").read_text())
    assert 2 <= done < 40
    assert len(stopped.drawn()) == done
    more = ("--load", str(folder), "--exit-interval", f"{done + 2}")
    copied = runs.root / "signalled_again"
    shutil.copytree(folder, copied)
    resumed = runs.run("signalled", *more, opus=OPUS, length=length, folder=copied)
    straight = runs.run("not_signalled", "--exit-interval", f"{done + 2}", opus=OPUS, length=length)
    assert resumed.drawn() == straight.drawn()


def test_a_run_goes_on_without_us_and_what_cannot_be_scored_is_refused(runs: LoopRuns) -> None:
    """Guards against checkpoints that Megatron alone cannot use, and against a refusal that ends in a traceback."""
    hooked = runs.run("ours", "--exit-duration-in-mins=-1", opus=OPUS)  # over after the first step
    assert {path.name for path in (hooked.folder / "opus").glob("*.pt")} == {"iter_0000001.pt"}
    alone = runs.run("theirs", "--load", str(hooked.folder))
    assert set(alone.steps) == {2, 3, 4}
    refused = runs.run("refused", "--iterations-to-skip", "2", opus=OPUS, expected=2)
    assert "megatron_opus: --iterations-to-skip [2]: a skipped iteration takes batches that nothing" in refused.log
    assert "Traceback" not in refused.log
