"""Every command of tools/bench_scoring.py at sizes of no meaning: what it measures, writes, merges and refuses."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import DistributedPool

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_scoring  # noqa: E402

from megatron_opus import style  # noqa: E402

SIZES = ["--hidden-size=32", "--num-layers=2", "--length=32", "--threads=1"]
TRAINED = [*SIZES, "--candidates=8", "--train-steps=6", "--batch-size=1"]


@pytest.fixture(scope="module")
def world1() -> Iterator[DistributedPool]:
    pool = DistributedPool(1, timeout=600.0)
    yield pool
    pool.close()


def command(argv: list[str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the tool in a worker."""
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_scoring

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = bench_scoring.main(argv)
    return status, out.getvalue(), err.getvalue()


def run(world1: DistributedPool, cache: Path, *argv: object) -> tuple[str, str]:
    ((status, out, err),) = world1.run(command, [*map(str, argv), f"--cache-dir={cache}"])
    assert status == 0, err
    return out, err


def rows_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


def test_flops_are_counted_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a recipe's own optimizer or override does not reach the count; counting allocates 8 billion weights."""
    path = tmp_path / "flops.json"
    assert bench_scoring.main(["flops", f"--json={path}"]) == 0
    assert "pretrain_gpt2_xl" in capsys.readouterr().out
    rows = {row["recipe"]: row for row in rows_of(path)}
    assert set(rows) == {"pretrain_gpt2_xl", "pretrain_gpt2_large", "cpt_qwen3_8b"}
    assert rows["cpt_qwen3_8b"]["optimizer"] == "muon"
    one = ["flops", "--recipe", str(ROOT / "configs" / "pretrain_gpt2_xl.yaml")]
    with pytest.raises(SystemExit):
        bench_scoring.main([*one[:1], "--repeats=3"])
    assert rows["pretrain_gpt2_xl"]["overhead"] < 0.139  # 4/6 of the share of tokens
    # Fault: an override behind a recipe is taken for another recipe
    assert bench_scoring.main([*one, "optimizer.name=muon", f"--json={path}"]) == 0
    assert [(row["recipe"], row["optimizer"]) for row in rows_of(path)] == [("pretrain_gpt2_xl", "muon")]


def test_the_overhead_of_a_real_step(world1: DistributedPool, embedded_cache: Path, tmp_path: Path) -> None:
    """Fault: the step with selection scores and then trains on nothing, or the shares and FLOPs are of other sizes."""
    path = tmp_path / "overhead.json"
    sizes = [*SIZES, "--candidates=4", "--chosen=2", "--proxy=1", "--score-length=16", "--repeats=2"]
    run(world1, embedded_cache, "overhead", *sizes, f"--json={path}")
    without, selected = rows_of(path)
    assert without["step"] == "without selection"
    assert selected["low"] <= selected["overhead"] <= selected["high"]
    assert selected["selecting"] > 0
    # 5 x 16 tokens forward and back to the activations, 2 x 32 forward and back to the weights too: 0.83 at most
    assert 0.5 < selected["FLOPs"] < 1.1
    assert ((result := world1.run(command, ["overhead", *SIZES, "--chosen=9"])[0])[0]) == 1
    assert "--chosen: expected at most the 8" in result[2]


def test_the_frontier_and_its_picture(world1: DistributedPool, embedded_cache: Path, tmp_path: Path) -> None:
    """Guards against a row without its fidelity, and against a picture that leaves out the second model's file."""
    first, second, picture = tmp_path / "32.json", tmp_path / "64.json", tmp_path / "frontier.svg"
    common = [*TRAINED, "--fidelity-proxy=2", "--tax-candidates=2", "--proxy=1", "--repeats=1"]
    names = "one_sided:8,two_sided:64,direction-exact"
    _, said = run(world1, embedded_cache, "frontier", *common, f"--json={first}", f"--estimators={names}")
    assert "training 6 steps" in said
    rows = rows_of(first)
    assert [row["estimator"] for row in rows] == names.split(",")
    for row in rows:
        assert row["tax"] > 0
        assert all(-1 <= row[f"{pool} spearman"] <= 1 for pool in ("mixed", "source"))
    assert rows[2]["mixed spearman"] == pytest.approx(1.0)  # no sketch and the oracle's second moment
    run(world1, embedded_cache, "frontier", *common, "--hidden-size=64", f"--json={second}", "--estimators=one_sided:8")
    assert bench_scoring.main(["picture", str(first), str(second), f"--output={picture}"]) == 0
    assert picture.read_text().count('<g id="axes_') == 4  # two pools of two models
    assert bench_scoring.main(["picture", str(picture), f"--output={picture}"]) == 1


@pytest.mark.parametrize(("low", "high"), [(1.0, 2.3), (1.02, 1.13), (1e-4, 0.15), (0.9, 40.0), (1.2, 1e6)])
def test_an_axis_of_logarithms_has_ticks_that_can_be_read(low: float, high: float) -> None:
    """Guards against an axis with a single tick, which says nothing of what lies beside it, or with a crowd of them."""
    plt = style.pyplot()
    figure, axes = plt.subplots()
    axes.set(xscale="log", xlim=(low, high))
    style.log_ticks(axes.xaxis, low, high)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    plt.close(figure)
    assert 3 <= len(labels) <= 8
    assert len(set(labels)) == len(labels)
    assert all(low <= float(label) <= high for label in labels)


def test_savings_behind_an_estimator_are_in_force(
    world1: DistributedPool, embedded_cache: Path, tmp_path: Path
) -> None:
    """Guards against a saving that is read and not applied: the same alignment as the default's, to the last bit."""
    path = tmp_path / "savings.json"
    names = ["one_sided:8"]
    names += [f"one_sided:8+{saving}" for saving in ("score_length=8", "scored_layers=last:1", "score_precision=bf16")]
    names += ["one_sided:8+score_micro_batch_size=4", "one_sided:8+score_length=8+score_windows=2+score_window=random"]
    options = ["--proxy=4", f"--json={path}", f"--estimators={','.join(names)}"]
    run(world1, embedded_cache, "fidelity", *TRAINED, *options)
    mixed = {row["estimator"]: row["pearson"] for row in rows_of(path) if row["pool"] == "mixed"}
    assert list(mixed) == names
    for name in names[1:]:
        same = "micro_batch_size" in name  # its chunks only round differently
        assert (mixed[name] == pytest.approx(mixed["one_sided:8"], abs=1e-6)) == same, name


def test_tax_and_fidelity(world1: DistributedPool, embedded_cache: Path, tmp_path: Path) -> None:
    """Fault: a clock or an option that is not passed on; sizes of an estimator mixed up."""
    path = tmp_path / "tax.json"
    tax = [*SIZES, "--candidates=4", "--proxy=1", "--repeats=2", "--clock=cpu"]
    run(world1, embedded_cache, "tax", *tax, f"--json={path}", "--estimators=one_sided:8,materialise:64")
    plain, *others = rows_of(path)
    assert plain["estimator"] == "plain"
    assert all(row["memory"] > 0 and row["tax"] > 0 for row in others)
    out, _ = run(world1, embedded_cache, "fidelity", *TRAINED, "--proxy=2")
    assert "one_sided:64" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tax", "--estimators=one_sided:x"], "estimator 'one_sided:x'"),
        (["tax", "--estimators=fourier"], "expected one of materialise"),
        (["tax", "--estimators=one_sided:8+rho=0.5"], "expected + and key=value with one of score_length"),
        (["proxy", "--warm-up-steps=3", "--further-steps=3"], "--warm-up-steps: expected fewer than"),
        (["fidelity", "--mixture=prose"], "expected domain=weight"),
        (["fidelity", "--mixture=prose=1", "--candidates=6", "--train-steps=62", "--length=512"], "not used"),
        (["tax", "--json=/nowhere/at/all.json"], "expected a file in an existing folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    world1: DistributedPool, embedded_cache: Path, argv: list[str], message: str
) -> None:
    """Fault: a traceback, or minutes of training before the complaint."""
    sizes = ["--hidden-size=16", "--num-attention-heads=1", "--num-layers=1", f"--cache-dir={embedded_cache}"]
    sizes += [] if any(x.startswith("--length") for x in argv) else ["--length=32"]
    ((status, _, error),) = world1.run(command, [*argv, *sizes])
    assert status == 1
    assert message in error


def test_results_of_another_kind_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: --json=the configuration."""
    path = tmp_path / "notes.json"
    for text in ("{}", "not JSON", '{"rows": [1]}'):
        path.write_text(text)
        assert bench_scoring.main(["flops", f"--json={path}"]) == 1
        assert "expected results of tools/bench_scoring.py" in capsys.readouterr().err
        assert path.read_text() == text


def unseen(cache: Path) -> dict[str, Any]:
    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.formats import indexed
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.config import ModelConfig, ParallelConfig
    from megatron_opus.data.prepare.embedded import prepare_embedded
    from megatron_opus.studies.bench.workbench import Workbench

    device = init_distributed(ParallelConfig())
    init_parallel(ParallelConfig())
    model = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    work = Workbench(model, prepare_embedded(cache, indexed, progress=False), length=32, device=device, seed=3)
    work.train(40, 4, mixture={"prose": 1.0})
    pool = work.pool("mixed", 6, 5, {"prose": 0.5, "source": 0.5})
    used = work.corpus.batch(sorted(work._seen)).tokens
    repeated = any(bool((row == used).all(1).any()) for row in pool.candidates.tokens)
    return {"repeated": repeated, "used": len(used)}


def test_pools_are_unseen(world1: DistributedPool, embedded_cache: Path) -> None:
    """Guards against candidates that the model was trained on, whose gradients are those of memory."""
    assert world1.run(unseen, embedded_cache) == [{"repeated": False, "used": 160}]


def measured_proxies(cache: Path) -> dict[str, Any]:
    import torch

    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.formats import indexed
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.config import ModelConfig, ParallelConfig
    from megatron_opus.data.prepare.embedded import prepare_embedded
    from megatron_opus.studies.bench import proxies
    from megatron_opus.studies.bench.estimators import Sizes
    from megatron_opus.studies.bench.workbench import Pool, Workbench

    device = init_distributed(ParallelConfig())
    init_parallel(ParallelConfig())
    model = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    work = Workbench(model, prepare_embedded(cache, indexed, progress=False), length=32, device=device, seed=3)
    batches = work.train(3, 2, mixture={"prose": 1.0}, further=3)
    pools = [work.pool(name, 6, 1, {name: 1.0}) for name in ("source", "prose")]
    target, text = proxies.parts_of_proxy(work, 20)
    sequences = [{tuple(x) for x in part.tokens.tolist()} for part in (target, text)]
    steps = [proxies.drawn(text, step, len(text) // 2, seed=1).tokens for step in range(2)]
    exact = proxies.truth(work, pools[0].candidates, target, Sizes(length=32))
    oracle = work.oracle(Pool(name="", candidates=pools[0].candidates, proxy=target))
    settings = [{"proxy_batch_size": 1, **more} for more in ({}, {"proxy_momentum": 0.9}, {"proxy_refresh_every": 3})]
    return {
        "parts": [len(part) for part in sequences],
        "all": len(sequences[0] | sequences[1]),
        "sequences": int(work.corpus.sequences("proxy").sum()),
        "twice": len(text) // 2 * 2 - len(torch.cat(steps).unique(dim=0)),
        "positions": proxies.windows(target, 16).position_ids.unique(dim=0).tolist(),
        "off": float((exact - oracle).abs().max() / oracle.abs().max()),
        "rows": proxies.fidelity(work, pools, batches, Sizes(length=16), proxy=20, warm_up=1, settings=settings),
    }


def test_a_proxy_is_measured_against_others_and_keeps_its_state(world1: DistributedPool, embedded_cache: Path) -> None:
    """Guards against a truth that shares sequences with the batches, and against scorers made anew at every step.

    An average or a batch that is not carried on from step to step would rank as no momentum and no keeping do.
    """
    (found,) = world1.run(measured_proxies, embedded_cache)
    assert found["parts"] == [20, found["sequences"] - 20]
    assert found["all"] == found["sequences"]  # none is in both
    assert found["twice"] == 0  # a batch is fresh until the text has been walked
    assert found["positions"] == [list(range(16))]
    assert found["off"] < 1e-4  # float32 against float64
    none, momentum, kept = found["rows"]
    for row in (none, momentum, kept):
        assert row["low"] == row["high"] == row["within"]  # of one domain
        assert row["mixed"] != row["whole mixed"]  # 16 tokens of 32
    assert len({none["mixed"], momentum["mixed"], kept["mixed"]}) == 3
