"""Experiments: what is announced, what is counted, what is reported."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_opus.config import ConfigError
from megatron_opus.nested import flatten
from megatron_opus.studies.lab import experiment, pictures, report, runner

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((ROOT / "configs/lab").glob("*.yaml"))


@pytest.mark.parametrize(
    ("arm", "baseline", "ratio"),
    [
        ([(100, 4.0), (200, 2.0)], [(100, 4.0), (200, 3.0)], 0.75),  # better: where it reached the baseline's end
        ([(100, 4.0), (200, 3.0)], [(100, 4.0), (200, 2.0)], 200 / 150),  # worse: where the baseline passed its end
        ([(100, 4.0), (200, 3.0)], [(100, 4.0), (200, 3.0)], 1.0),
        ([(100, 4.0), (400, 1.0)], [(100, 4.0), (200, 3.0)], 1.0),  # another budget: 200 against 200
    ],
)
def test_the_ratio_to_target_is_interpolated_on_the_better_curve(arm, baseline, ratio):
    """Fault: extrapolation beyond a curve, or a ratio that says `never` for every arm worse than random."""
    assert report.ratio_to_target(arm, baseline) == pytest.approx(ratio)
    assert math.isnan(report.ratio_to_target([(100, math.nan)], baseline))


def test_the_fragment_is_the_composition_that_was_measured():
    """Fault: settings offered to users that are not those of the experiment that speaks for them. How much of a
    sequence is scored is left to the recipe, whose sequences have another length."""
    fragment = flatten(yaml.safe_load((ROOT / "configs/base/picked.yaml").read_text(encoding="utf-8")))
    for path in EXPERIMENTS:
        if path.stem in ("explored", "explored_hidden", "explored_clean"):
            arms = yaml.safe_load(path.read_text(encoding="utf-8"))["arms"]
            assert {**fragment, "selection.score_length": 64} == arms["explored"], path


# --- the file -------------------------------------------------------------------------------------------------------


def experiment_file(tmp_path: Path, **changes: Any) -> Path:
    raw = {
        "name": "mini",
        "hypothesis": "a is lower",
        "metric": ["prose"],
        "stopping_rule": "four steps",
        "recipe": str(ROOT / "configs/pretrain_gpt2_tiny.yaml"),
        "settings": {"training.train_steps": 4},
        "baseline": "random",
        "seeds": [1, 2, 3],
        "arms": {"random": {"selection.strategy": "random"}, "opus": {"selection.strategy": "opus"}},
        **changes,
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stopping_rule": None}, "stopping_rule is missing"),
        ({"hypothesis": " "}, "hypothesis: expected text"),
        ({"metric": "prose"}, "metric: expected a list"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"baseline": "opsu"}, "baseline: expected one of the arms random, opus"),
        ({"stoping_rule": "x"}, "unknown key stoping_rule; did you mean stopping_rule?"),
        ({"arms": {"random": {"seed": 3}}}, "random: seed is set by the laboratory"),
        ({"corpus": "noisy", "settings": {"data.path": "x"}}, "settings: data.path is set by the laboratory"),
        ({"shared": {"metric": ["x"]}}, "shared: expected metric and settings"),
        ({"contrasts": [["opus", "opsu"]]}, "contrasts: expected pairs of two different arms"),
        ({"contrasts": [["opus", "opus"]]}, "contrasts: expected pairs of two different arms"),
        ({"contrasts": ["opus", "random"]}, "contrasts: expected pairs of two different arms"),
        ({"start": {"name": "x"}}, "start: name is set by the laboratory"),
        ({"arms": {"start": {}, "random": {}}}, "start is the name of the run that arms begin with"),
    ],
)
def test_an_incomplete_experiment_is_refused(tmp_path, changes, said):
    """Fault: an experiment whose question or end is decided after its results are seen."""
    with pytest.raises(experiment.LabError, match=said.replace("?", r"\?")):
        experiment.read_experiment(experiment_file(tmp_path, **changes))


def test_every_setting_is_checked_before_anything_starts(tmp_path):
    """Fault: the last arm of a night's experiment fails at its start for a mistyped key."""
    path = experiment_file(tmp_path, arms={"random": {}, "opus": {"selection.tmperature": 1.0}})
    with pytest.raises(ConfigError, match=r"did you mean selection\.temperature"):
        experiment.read_experiment(path).runs(tmp_path, None)
    path = experiment_file(tmp_path, settings={"parallel.tensor_model_parallel_size": 2})
    with pytest.raises(ConfigError, match="tensor_model_parallel_size"):
        experiment.read_experiment(path).runs(tmp_path, None)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_protocol_is_complete_and_runs_random_as_its_baseline(path):
    """Fault: a protocol that no longer loads, compares with another buffer, or takes fewer than three seeds."""
    found = experiment.read_experiment(path)
    assert found.name == path.stem
    assert len(found.seeds) >= 3
    variants = [found, *([found.on_shared_text()] if found.shared else [])]
    for variant in variants:
        runs = variant.runs(Path("x"), None)
        assert {run.config.selection.strategy for run in runs if run.arm == found.baseline} == {"random"}
        # an arm of another size says so by its name
        sized = ("rho_", "random_longer", "random_matched", "composition", experiment.START)
        sized += ("opus_025", "weight_025", "uncontrolled", "prefilter_matched", "picked", "explored_1")
        same = [run.config for run in runs if not run.arm.startswith(sized)]
        assert len({(config.buffer_size, config.training.train_steps) for config in same}) == 1
        if path.stem != "schedule":  # its arms are mixtures, with one mean over the run
            assert len({str(run.config.data.domain_weights) for run in runs}) == 1


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_a_corpus_of_one_domain_has_no_weights(path):
    """Fault: weights of the recipe's own domains over a corpus of one: `web` and `parts_hidden` were announced and
    could not start."""
    found = experiment.read_experiment(path)
    variants = [found, *([found.on_shared_text()] if found.shared else [])]
    for run in (run for variant in variants for run in variant.runs(Path("x"), None)):
        if found.corpus in ("hidden", "web"):
            assert run.config.data.domain_weights is None, run.arm


def test_what_was_announced_stands(tmp_path):
    """Fault: a hypothesis or a setting changed after the runs, under the same name."""
    first = experiment.read_experiment(experiment_file(tmp_path))
    made = experiment.record(first, first.runs(tmp_path / "mini", None), tmp_path / "mini")
    assert made["added_later"] == []
    assert experiment.record(first, first.runs(tmp_path / "mini", None), tmp_path / "mini") == made
    for change, said in (
        ({"hypothesis": "a is higher"}, "the hypothesis was announced as 'a is lower'"),
        ({"settings": {"training.train_steps": 5}}, "was planned with training.train_steps = 4, now 5"),
    ):
        other = experiment.read_experiment(experiment_file(tmp_path, **change))
        with pytest.raises(experiment.LabError, match=said):
            experiment.record(other, other.runs(tmp_path / "mini", None), tmp_path / "mini")
    more = experiment.read_experiment(experiment_file(tmp_path, seeds=[1, 2, 3, 4]))
    made = experiment.record(more, more.runs(tmp_path / "mini", None), tmp_path / "mini")
    assert made["added_later"] == ["random-4", "opus-4"]
    more = experiment.read_experiment(experiment_file(tmp_path, seeds=[1, 2, 3, 4], contrasts=[["opus", "random"]]))
    for _ in range(2):  # asked for again, it is not added again
        made = experiment.record(more, more.runs(tmp_path / "mini", None), tmp_path / "mini")
        assert made["added_later"] == ["random-4", "opus-4", "opus minus random"]


# --- the report -----------------------------------------------------------------------------------------------------

CONFIG = "name: x\nmodel: {num_layers: 1, hidden_size: 8, num_attention_heads: 1}\nselection: {strategy: STRATEGY}\n"


def write_run(
    run: experiment.PlannedRun, losses: dict[int, float], seconds: float, score: float = 0.0, cpu: float | None = None
) -> None:
    run.directory.mkdir(parents=True)
    strategy = run.config.selection.strategy
    (run.directory / "config.yaml").write_text(CONFIG.replace("STRATEGY", strategy))
    rows = []
    for step in range(max(losses) + 1):
        rows.append({"step": step, "update_tokens": 100 * (step + 1), "step_seconds": seconds, "score_seconds": score})
        if cpu is not None:
            rows[-1]["step_cpu_seconds"] = cpu
        if step in losses:
            rows[-1]["validation_loss"] = {"prose": losses[step], "code": 9.0}
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def results(folder) -> report.Results:
    """Random ends at 3.0 + seed / 10. Opus: 0.5 lower for seeds 1 and 2, which took twice as long; seed 3 failed."""
    found = experiment.read_experiment(experiment_file(folder))
    runs = found.runs(folder, None)
    record = experiment.record(found, runs, folder)
    for run in runs:
        shift = run.seed / 10
        if run.arm == "random":
            write_run(run, {1: 4.0 + shift, 3: 3.0 + shift}, 1.0)
        elif run.seed < 3:
            write_run(run, {1: 4.0 + shift, 3: 2.5 + shift}, 2.0, 0.5)
        else:
            (folder / "logs").mkdir()
            runner.log_of(run).write_text("step 1/4\nerror: rank 0: out of luck\n")
    return report.collect(found, runs, record)


def test_arms_are_paired_with_the_baseline_by_seed(results):
    """Fault: seeds compared with other seeds', the baseline's extra seed in a difference, seconds without scoring."""
    random, opus = results.arms
    assert (random.difference, random.token_ratio, random.overhead) == (None, None, None)
    assert random.loss.mean == pytest.approx(3.2)
    assert (opus.seeds, opus.strategy) == ([1, 2], "opus")
    assert opus.loss.mean == pytest.approx(2.65)
    assert opus.difference.mean == pytest.approx(-0.5)
    assert opus.difference.half == pytest.approx(0.0, abs=1e-9)
    reached = 200 + 200 * (1.0 / 1.5)  # from 4.0 to 2.5 in 200 tokens: 3.0 after two thirds
    assert opus.token_ratio.mean == pytest.approx(reached / 400)
    assert opus.second_ratio.mean == pytest.approx(2 * reached / 400)
    assert opus.overhead.mean == pytest.approx(1.0)
    assert opus.scoring_share.mean == pytest.approx(0.25)


def test_arms_are_compared_with_each_other_by_seed(tmp_path):
    """Fault: two arms said to differ, or not to, by their intervals against random, which share random's noise; a
    contrast turned round; a seed that only one of the two finished."""
    arms = {name: {"selection.temperature": i + 1} for i, name in enumerate(("random", "hot", "cold"))}
    path = experiment_file(tmp_path, arms=arms, contrasts=[["cold", "hot"]])
    found = experiment.read_experiment(path)
    folder = tmp_path / "out" / "mini"
    runs = found.runs(folder, None)
    record = experiment.record(found, runs, folder)
    for run in runs:
        if run.name != "cold-3":
            end = {"random": 3.0, "hot": 2.0, "cold": 1.75}[run.arm] + run.seed
            write_run(run, {1: 8.0, 3: end}, 1.0)
    results = report.collect(found, runs, record)
    (contrast,) = results.contrasts
    assert (contrast.arm, contrast.other, contrast.seeds) == ("cold", "hot", [1, 2])
    assert contrast.difference.mean == pytest.approx(-0.25)
    assert contrast.difference.half == pytest.approx(0.0, abs=1e-9)
    assert contrast.token_ratio.mean < 1
    assert "\ncold minus hot  2/3    -0.2500 ± 0.0000" in report.table(results)
    assert "| cold minus hot | 2/3 | **-0.2500 ± 0.0000** |" in report.markdown(results)
    assert report.as_json(results)["contrasts"][0]["difference"]["mean"] == pytest.approx(-0.25)
    assert "contrasts.png" in {picture.name for picture in pictures.draw(report.as_json(results), tmp_path)}


def test_failed_runs_are_listed_with_the_reason(results):
    """Fault: an arm that looks better because its diverged seed is missing without a word."""
    assert results.failed == [("opus-3", "at step 0 of 4: error: rank 0: out of luck")]
    text = report.table(results)
    assert "opus    2/3" in text
    assert "out of luck" in text
    assert "a is lower" in text
    assert "four steps" in text


def test_the_json_says_what_the_table_says(results, tmp_path):
    """Fault: figures for further work that differ from the printed ones."""
    report.write(results, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert [arm["arm"] for arm in data["arms"]] == ["random", "opus"]
    assert data["arms"][1]["difference"]["mean"] == pytest.approx(-0.5)
    assert data["arms"][0]["difference"] is None
    assert data["failed"][0]["run"] == "opus-3"
    assert len(data["runs"]) == 5
    assert (tmp_path / "report.txt").read_text() == report.table(results) + "\n"
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines[3].startswith("| opus | 2/3 | 2.6500 ± ")
    assert "| **-0.5000 ± 0.0000** |" in lines[3]


def test_every_picture_is_drawn(results, tmp_path):
    """Fault: a picture that fails on an arm with fewer seeds than the baseline, or on the baseline itself."""
    found = pictures.draw(report.as_json(results), tmp_path)
    assert {path.name for path in found} == {"differences.png", "loss_tokens.png", "loss_seconds.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)


def test_a_picture_has_at_most_seven_lines():
    """Guards against a picture in which no line can be told apart, and one that shows the best arms alone."""
    losses = {"random": 3.0, **{f"arm_{place}": 2.0 + place / 10 for place in range(9)}}
    arms = [{"arm": arm, "seeds": [1], "loss": {"mean": loss}} for arm, loss in losses.items()]
    found = pictures.shown({"baseline": "random", "arms": arms})
    assert found == ["random", *(f"arm_{place}" for place in range(6))]  # in the order of the protocol
    assert pictures.shown({"baseline": "random", "arms": arms[:7]}) == list(losses)[:7]


def test_a_metric_that_was_not_evaluated_is_refused(results, folder, tmp_path):
    """Fault: a KeyError after hours of training, or another domain's loss in the table."""
    other = experiment.read_experiment(experiment_file(tmp_path, metric=["prosa"]))
    with pytest.raises(experiment.LabError, match="evaluated prose, code, not prosa"):
        report.collect(other, other.runs(folder, None), {"added_later": []})


def test_the_processor_clock_leaves_out_what_else_the_machine_did(tmp_path):
    """Fault: runs beside each other, compared by a wall clock that counts the waiting of one for the other; a
    clock that was not recorded, taken for 0 seconds."""
    found = experiment.read_experiment(experiment_file(tmp_path, clock="cpu", seeds=[1]))
    runs = found.runs(tmp_path / "out", None)
    record = experiment.record(found, runs, tmp_path / "out")
    for run in runs:
        opus = run.arm == "opus"
        write_run(run, {1: 4.0, 3: 3.0}, 1.0 if opus else 5.0, cpu=0.75 if opus else 0.5)
    arm = next(a for a in report.collect(found, runs, record).arms if a.arm == "opus")
    assert arm.overhead is not None
    assert arm.overhead.mean == pytest.approx(0.5)
    assert arm.second_ratio is not None
    assert arm.second_ratio.mean == pytest.approx(1.5)
    metrics = runs[0].directory / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("step_cpu_seconds", "something_else"))
    with pytest.raises(experiment.LabError, match="expected step_cpu_seconds"):
        report.collect(found, runs, record)


def test_seconds_before_the_first_step_are_counted(tmp_path):
    """Guards against a filter that scored for an hour and passes for as fast as random, and a misspelt arm."""
    before = tmp_path / "before.json"
    before.write_text(json.dumps({"opus": 2.0}))
    found = experiment.read_experiment(experiment_file(tmp_path, clock="cpu", seeds=[1], before=str(before)))
    runs = found.runs(tmp_path / "out", None)
    record = experiment.record(found, runs, tmp_path / "out")
    for run in runs:
        write_run(run, {1: 4.0, 3: 3.0}, 1.0, cpu=0.5)
    arm = next(a for a in report.collect(found, runs, record).arms if a.arm == "opus")
    assert arm.second_ratio is not None
    assert arm.second_ratio.mean == pytest.approx(2.0)  # 4 steps of half a second, and 2 seconds before them
    before.write_text(json.dumps({"opsu": 2.0}))
    with pytest.raises(experiment.LabError, match="expected arms of the experiment, got opsu"):
        report.collect(found, runs, record)
    before.unlink()
    with pytest.raises(experiment.LabError, match="expected JSON, arm -> seconds"):
        report.collect(found, runs, record)


def started(
    tmp_path, monkeypatch, broken: str = ""
) -> tuple[experiment.Experiment, list[experiment.PlannedRun], list[str], list[str]]:
    """An experiment with a start, its runs ended in an instant, their order, and what was said."""
    found = experiment.read_experiment(experiment_file(tmp_path, seeds=[1, 2], start={"training.train_steps": 2}))
    runs = found.runs(tmp_path / "out" / "mini", None)
    experiment.record(found, runs, tmp_path / "out" / "mini")
    order: list[str] = []
    said: list[str] = []

    def start(run: experiment.PlannedRun, _: Any) -> subprocess.Popen[bytes]:
        assert run.after is None or runner.is_finished(run.after)
        order.append(run.name)
        steps = run.config.training.train_steps
        write_run(run, {steps - 1: 3.0}, 1.0)
        if run.arm == experiment.START and run.name != broken:
            saved = run.directory / f"checkpoints/step_{steps:08d}"
            saved.mkdir(parents=True)
            (saved / "complete.json").touch()
        return subprocess.Popen(["true"])

    monkeypatch.setattr(runner, "_start", start)
    runner.run_all(runs, jobs=2, say=said.append)
    return found, runs, order, said


def test_arms_begin_with_the_weights_of_their_seed(tmp_path, monkeypatch):
    """Fault: an arm that starts before its start has ended, with another seed's, or with data the start has seen first;
    the start reported as an arm."""
    found, runs, order, _ = started(tmp_path, monkeypatch)
    assert sorted(order) == sorted(run.name for run in runs)
    assert all(order.index(f"start-{run.seed}") <= order.index(run.name) for run in runs)
    for run in runs:
        first = run.arm == experiment.START
        assert run.config.training.train_steps == (2 if first else 4)
        assert run.config.model.init_from == (None if first else str(run.directory.with_name(f"start-{run.seed}")))
        assert run.config.seed == run.seed + (experiment.START_SEEDS if first else 0)
    results = report.collect(found, runs, {"added_later": []})
    assert [arm.arm for arm in results.arms] == ["random", "opus"]
    assert {arm for arm, _ in results.runs} == {"random", "opus"}


def test_arms_of_a_failed_start_are_not_run(tmp_path, monkeypatch):
    """Fault: endless waiting for a start that failed, or arms that begin with an older checkpoint of one that was ended
    between its last step and its last checkpoint."""
    found, runs, order, said = started(tmp_path, monkeypatch, broken="start-2")
    assert {*order} == {"start-1", "start-2", "random-1", "opus-1"}
    assert any(line.startswith("start-2: FAILED") for line in said)
    failed = dict(report.collect(found, runs, {"added_later": []}).failed)
    assert {*failed} == {"start-2", "random-2", "opus-2"}
    assert failed["opus-2"] == "not started: start-2 is not finished"
