"""Every command of tools/bench_scoring.py at sizes of no meaning: what it measures, writes, merges and refuses."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import DistributedPool

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_scoring  # noqa: E402

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
    one = ["flops", "--recipe", str(ROOT / "configs" / "pretrain_gpt2_xl.yaml"), f"--json={path}"]
    with pytest.raises(SystemExit):
        bench_scoring.main([*one[:1], "--repeats=3"])
    assert rows["pretrain_gpt2_xl"]["overhead"] < 0.139  # 4/6 of the share of tokens
    assert bench_scoring.main(one) == 0
    assert len(rows_of(path)) == 3  # the same row again, in its place
    # Fault: an override behind a recipe is taken for another recipe
    assert bench_scoring.main([*one[:3], "optimizer.name=muon", f"--json={path}"]) == 0
    assert [row["optimizer"] for row in rows_of(path) if row["recipe"] == "pretrain_gpt2_xl"] == ["adamw", "muon"]


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


def test_the_frontier_grows_from_run_to_run(world1: DistributedPool, embedded_cache: Path, tmp_path: Path) -> None:
    """Fault: a second size replaces the first; the trained model is not found again; a row without its fidelity."""
    path, picture, cache = tmp_path / "frontier.json", tmp_path / "frontier.svg", tmp_path / "models"
    common = [*TRAINED, "--fidelity-proxy=2", "--tax-candidates=2", "--proxy=1", "--repeats=1"]
    common += [f"--json={path}", f"--picture={picture}", f"--model-cache={cache}"]
    _, said = run(world1, embedded_cache, "frontier", *common, "--estimators=one_sided:8,two_sided:64")
    assert "expected minutes" in said
    assert "training 6 steps" in said
    first = rows_of(path)
    assert [row["estimator"] for row in first] == ["one_sided:8", "two_sided:64"]
    for row in first:
        assert row["tax"] > 0
        assert all(-1 <= row[f"{pool} spearman"] <= 1 for pool in ("mixed", "source"))
    _, said = run(world1, embedded_cache, "frontier", *common, "--estimators=direction-exact,one_sided:8")
    assert "training 6 steps" not in said  # kept
    second = rows_of(path)
    assert [row["estimator"] for row in second] == ["one_sided:8", "two_sided:64", "direction-exact"]
    assert second[2]["mixed spearman"] == pytest.approx(1.0)  # no sketch and the oracle's second moment
    assert second[0]["mixed pearson"] == pytest.approx(first[0]["mixed pearson"], abs=1e-6)
    run(world1, embedded_cache, "frontier", *common, "--hidden-size=64", "--estimators=one_sided:8")
    assert [row["d"] for row in rows_of(path)] == [32, 32, 32, 64]
    assert len(json.loads(path.read_text())["runs"]) == 3
    drawn = picture.read_text()
    assert "d = 32, 2 layers, T = 32; source pool" in drawn or drawn.count("<use") > 4
    before = path.read_text()
    _, said = run(world1, embedded_cache, "frontier", *common, "--estimate-only", "--estimators=all")
    assert "frontier of 17 estimators, expected minutes" in said
    assert path.read_text() == before
    (cached,) = [x for x in cache.iterdir() if x.name.startswith("d32")]
    cached.write_bytes(cached.read_bytes()[:1000])
    ((status, _, error),) = world1.run(
        command, ["frontier", *common, "--estimators=one_sided:8", f"--cache-dir={embedded_cache}"]
    )
    assert status == 1
    assert "expected a trained model" in error
    assert path.read_text() == before


def test_every_economy_has_its_rows(world1: DistributedPool, embedded_cache: Path, tmp_path: Path) -> None:
    """Fault: a saving that is not in force (the same alignment as the default's), chunks that are not the whole, a
    "stale" proxy that was read anew, a larger proxy batch that is no closer to the oracle's."""
    path = tmp_path / "economy.json"
    options = ["--oracle-proxy=24", "--proxy-sizes=1,16", "--refresh=1,3", "--draw-candidates=32"]
    options += ["--redundancy-dims=4096,64", f"--model-cache={tmp_path}", f"--json={path}", "--proxy=4"]
    out, _ = run(world1, embedded_cache, "economy", *TRAINED, *options)
    assert all(title in out for title in bench_scoring.SECTIONS)
    rows = rows_of(path)
    by_section = {s: [row for row in rows if row["section"] == s] for s in bench_scoring.SECTIONS}
    mixed = {row["saving"]: row for row in by_section["savings"] if row["pool"] == "mixed"}
    assert {"default", "score_length=8", "scored_layers=last:1", "score_precision=bf16"} <= set(mixed)
    assert sum("random" in name for name in mixed) == 2
    for name, row in mixed.items():
        if name.startswith("score_micro_batch_size"):
            assert row["difference"] < 1e-5
        elif name == "score_precision=bf16":
            assert 1e-6 < row["difference"] < 0.1
        elif name != "default":
            assert row["pearson"] != pytest.approx(mixed["default"]["pearson"], abs=1e-9), name
    sizes = {(row["pool"], row["saving"]): row["spearman"] for row in by_section["proxy"]}
    assert sizes["mixed", "proxy_batch_size=16"] > sizes["mixed", "proxy_batch_size=1"]
    finer, coarser = (row["entries"] for row in by_section["redundancy"][:2])
    assert finer > coarser
    assert [row["updates since"] for row in by_section["stale"]] == [0, 2, 0, 2]
    assert all(0 < row["share of a step"] < 1 for row in by_section["draws"])


def test_tax_and_fidelity(world1: DistributedPool, embedded_cache: Path, tmp_path: Path) -> None:
    """Fault: a clock or an option that is not passed on; sizes of an estimator mixed up."""
    path = tmp_path / "tax.json"
    tax = [*SIZES, "--candidates=4", "--proxy=1", "--repeats=2", "--clock=cpu"]
    run(world1, embedded_cache, "tax", *tax, f"--json={path}", "--estimators=one_sided:8,materialise:64")
    plain, *others = rows_of(path)
    assert plain["estimator"] == "plain"
    assert all(row["memory"] > 0 and row["tax"] > 0 for row in others)
    out, _ = run(world1, embedded_cache, "fidelity", *TRAINED, "--proxy=2", f"--model-cache={tmp_path}")
    assert "one_sided:64" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tax", "--estimators=one_sided:x"], "estimator 'one_sided:x'"),
        (["tax", "--estimators=fourier"], "expected one of materialise"),
        (["economy", "--estimators=all"], "expected one, the default"),
        (["fidelity", "--mixture=prose"], "expected domain=weight"),
        (["economy", "--oracle-proxy=100000", "--train-steps=1"], "lower --oracle-proxy"),
        (["fidelity", "--mixture=prose=1", "--candidates=6", "--train-steps=62", "--length=512"], "not used"),
        (["tax", "--json=/nowhere/at/all.json"], "expected a file in an existing folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    world1: DistributedPool, embedded_cache: Path, tmp_path: Path, argv: list[str], message: str
) -> None:
    """Fault: a traceback, or minutes of training before the complaint."""
    sizes = ["--hidden-size=16", "--num-attention-heads=1", "--num-layers=1", f"--cache-dir={embedded_cache}"]
    sizes += [] if any(x.startswith("--length") for x in argv) else ["--length=32"]
    sizes += [] if argv[0] == "tax" else [f"--model-cache={tmp_path}"]
    ((status, _, error),) = world1.run(command, [*argv, *sizes])
    assert status == 1
    assert message in error


def test_results_of_another_kind_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: --json=the configuration."""
    path = tmp_path / "notes.json"
    for text in ("{}", "not JSON", '{"runs": [], "rows": [1]}'):
        path.write_text(text)
        assert bench_scoring.main(["flops", f"--json={path}"]) == 1
        assert "expected results of an earlier run" in capsys.readouterr().err
        assert path.read_text() == text


def pairs(cache: Path) -> dict[str, Any]:
    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.formats import indexed
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.config import ModelConfig, ParallelConfig
    from megatron_opus.data.prepare.embedded import prepare_embedded
    from megatron_opus.studies.bench import workbench

    device = init_distributed(ParallelConfig())
    init_parallel(ParallelConfig())
    model = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    corpus = prepare_embedded(cache, indexed, progress=False)
    work = workbench.Workbench(model, corpus, length=32, device=device, seed=3)
    work.train(40, 4, mixture={"prose": 1.0})
    pool = work.pool("mixed", 6, 5, {"prose": 0.5, "source": 0.5})
    used = work.corpus.batch(sorted(work._seen)).tokens
    whole = work.oracle_pairs(pool.candidates, pool.proxy)
    with mock.patch.object(workbench, "PAIRS_BYTES", 1):  # one candidate at a time
        one_by_one = work.oracle_pairs(pool.candidates, pool.proxy)
    return {
        "oracle": work.oracle(pool),
        "pairs": whole,
        "one by one": one_by_one,
        "repeated": any(bool((row == used).all(1).any()) for row in pool.candidates.tokens),
        "used": len(used),
    }


def test_pairs_average_to_the_oracle_and_pools_are_unseen(world1: DistributedPool, embedded_cache: Path) -> None:
    """Fault: the proxy's mean taken over candidates; candidates that the model was trained on, whose gradients are
    those of memory."""
    ((found),) = world1.run(pairs, embedded_cache)
    torch.testing.assert_close(found["pairs"].mean(1), found["oracle"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["pairs"], found["one by one"], rtol=1e-9, atol=0)
    assert found["used"] == 160
    assert not found["repeated"]
