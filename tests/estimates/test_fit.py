from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opus import config as configs
from megatron_opus.config import RunConfig
from megatron_opus.estimates.fit import (
    Machine,
    PreflightError,
    check_memory,
    container_headroom,
    fitting_layouts,
    start_up_report,
)
from megatron_opus.estimates.memory import GIB, estimate
from megatron_opus.layout.parallel_layout import ParallelLayout, parallel_layout

ROOT = Path(__file__).parents[2]
LAPTOP = Machine(device="cpu", bytes_found=16 * GIB, local_ranks=2, source="available memory")
H100 = Machine(device="cuda", bytes_found=79 * GIB, local_ranks=8, source="free GPU memory")


def model(name: str, **overrides: object) -> RunConfig:
    values = {"name": "t", "data.seq_length": 1024, "training.precision": "bf16", **overrides}
    return configs.load(ROOT / f"configs/models/gpt2_{name}.yaml", [f"{k}={v}" for k, v in values.items()])


def test_xl_on_a_small_machine() -> None:
    """Without a look beforehand the kernel ends a rank minutes later, with no message at all."""
    with pytest.raises(PreflightError) as caught:
        check_memory(model("xl"), 2, replace(LAPTOP, bytes_found=40 * GIB))
    text = str(caught.value)
    needed, found = map(float, re.search(r"([\d.]+) GiB needed, ([\d.]+) GiB found", text).groups())  # type: ignore[union-attr]
    assert found == 20.0
    assert needed > 12 * 1.5576112e9 / 2 / GIB  # at least the optimizer's share
    assert "optimizer" in text
    assert "layouts that would fit on machines like this one, 2 ranks each:" in text
    assert re.search(r"a smaller recipe that fits here: model.num_layers=\d+ data.seq_length=\d+", text)


def test_what_fits_passes() -> None:
    """A check that is too careful sends people to `skip_preflight` flags."""
    (line,) = check_memory(model("xl"), 8, H100)
    assert "GiB needed, 79.00 GiB found (free GPU memory, 8 ranks on this machine)" in line
    check_memory(model("xl", **{"model.num_layers": 2, "selection.score_micro_batch_size": 2}), 2, LAPTOP)


def test_scoring_that_is_too_wide() -> None:
    """All candidates in one forward: their logits alone are larger than the model, and one key cures it."""
    with pytest.raises(PreflightError) as caught:
        check_memory(model("small", **{"selection.score_length": 1024}), 2, LAPTOP)
    found = re.search(r"it fits with (selection.score_micro_batch_size)=(\d+)", str(caught.value))
    assert found is not None
    check_memory(model("small", **{"selection.score_length": 1024, found[1]: int(found[2])}), 2, LAPTOP)


def test_the_start_up_report_says_what_scoring_sends() -> None:
    """Guards against traffic that is known by formula and shown to nobody, or shown where nothing is scored or sent."""
    memory, traffic = start_up_report(model("xl"), 8, H100)
    assert [memory] == check_memory(model("xl"), 8, H100)
    assert traffic == "traffic per rank: 245.90 MB sent by one scoring pass, 235.93 MB of it proxy"
    assert len(start_up_report(model("xl"), 1, replace(H100, bytes_found=1000 * GIB))) == 1
    assert len(start_up_report(model("xl", **{"selection.strategy": "random"}), 8, H100)) == 1


def test_suggested_layouts_fit_and_can_run() -> None:
    """A suggestion that fails in its turn: 25 heads cannot be halved, 16 sequences are not shared by 32 ranks."""
    config = model("large", **{"training.micro_batch_size": 4})
    layouts = list(fitting_layouts(config, LAPTOP))
    assert layouts
    for layout, need in layouts:
        assert 20 % layout.tp == 0
        assert config.training.global_batch_size % (layout.dp * layout.micro_batch_size) == 0
        assert need.total <= LAPTOP.per_rank(min(2, layout.ranks))
    ranks = [layout.ranks for layout, _ in layouts]
    assert ranks == sorted(ranks)
    assert {layout.tp for layout, _ in fitting_layouts(model("xl"), H100)} == {1}


def test_nothing_fits() -> None:
    """An empty list of layouts reads like a formatting fault."""
    phone = replace(LAPTOP, bytes_found=0.3 * GIB)
    with pytest.raises(PreflightError, match="no layout of up to 1024 ranks"):
        check_memory(model("xl"), 2, phone)


def test_every_setting_moves_the_estimate() -> None:
    """A part of the sum that ignores its setting advises changes that change nothing."""
    base = model("medium", **{"training.micro_batch_size": 4})
    one = ParallelLayout(tp=1, dp=2, zero_stage=1, micro_batch_size=4)
    need = estimate(base, one, device="cuda")

    def part(name: str, layout: ParallelLayout = one, **overrides: object) -> float:
        config = model("medium", **{"training.micro_batch_size": 4, **overrides})
        return getattr(estimate(config, layout, device="cuda"), name)

    assert part("weights", replace(one, tp=2)) < 0.6 * need.weights
    assert part("optimizer", replace(one, dp=8)) == need.optimizer / 4
    assert part("optimizer", replace(one, zero_stage=0)) == 2 * need.optimizer
    large = model("xl", **{"training.micro_batch_size": 1, "training.global_batch_size": 64})
    stages = [estimate(large, replace(one, zero_stage=z, dp=32, micro_batch_size=1), device="cuda") for z in (0, 1, 2)]
    assert stages[0].total > stages[1].total > stages[2].total
    assert part("training", replace(one, micro_batch_size=1)) < 0.5 * need.training
    assert part("training", **{"data.seq_length": 512}) < 0.6 * need.training
    assert part("scoring", **{"selection.score_micro_batch_size": 4}) < need.scoring
    assert part("scoring", **{"selection.strategy": "random"}) == 0
    assert part("weights", **{"training.precision": "fp32"}) == 2 * need.weights
    assert parallel_layout(model("xl"), 8) == ParallelLayout(tp=1, dp=8, zero_stage=1, micro_batch_size=1)


def test_container_limits(tmp_path: Path) -> None:
    """Free memory of the host, in a container that may use a tenth of it: killed at the first step."""
    assert container_headroom(tmp_path) is None
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 10\ninactive_file 1500\n")
    assert container_headroom(tmp_path) == 4500
    (tmp_path / "memory.max").write_text("max\n")
    assert container_headroom(tmp_path) is None
    old = tmp_path / "old"
    (old / "memory").mkdir(parents=True)
    (old / "memory" / "memory.limit_in_bytes").write_text("9000")
    (old / "memory" / "memory.usage_in_bytes").write_text("8500")
    (old / "memory" / "memory.stat").write_text("total_inactive_file 100\n")
    assert container_headroom(old) == 600


MEASURE = """
import functools, json, sys, warnings
warnings.filterwarnings("ignore")
sys.path[:0] = sys.argv[1:3]
import psutil, torch
from gpt_runs import recipe, start, steps
from test_fit import measured_config
from megatron_opus.backends.engines import build  # what importing takes is not the run's
from megatron_opus.types import Batch

config = measured_config(*sys.argv[3:])
torch.nn.Linear(64, 64)(torch.randn(4, 64)).sum().backward()
before = psutil.Process().memory_info().rss
engine, groups = start(config)
length, size = config.data.seq_length, config.training.micro_batch_size
def batch():
    t = torch.randint(0, config.model.vocab_size, (size, length + 1))
    return Batch(tokens=t[:, :-1], labels=t[:, 1:], loss_mask=torch.ones(size, length),
                 position_ids=torch.arange(length).expand(size, length))
for _ in range(2):
    engine.train_step(iter([batch() for _ in range(engine.deepspeed.gradient_accumulation_steps())]))
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
print(json.dumps(peak - before))
"""


def measured_config(zero: str, optimizer: str) -> RunConfig:
    return model(
        "small",
        **{
            "model.num_layers": 4,
            "model.hidden_size": 512,
            "model.num_attention_heads": 8,
            "model.vocab_size": 16384,
            "data.seq_length": 512,
            "training.precision": "fp32",
            "training.global_batch_size": 4,
            "training.micro_batch_size": 2,
            "selection.strategy": "random",
            "parallel.zero_stage": zero,
            "optimizer.name": optimizer,
        },
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(("zero", "optimizer"), [("1", "adamw"), ("3", "muon")])
def test_estimate_against_a_real_run(zero: str, optimizer: str) -> None:
    """Arithmetic that nobody compares with a run drifts from the code until it refuses what fits.

    Peak resident memory of two steps; the estimate may be above it by half, and below it by a twentieth.
    """
    arguments = [sys.executable, "-c", MEASURE, str(ROOT), str(ROOT / "tests" / "support"), zero, optimizer]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}:{Path(__file__).parent}", "OMP_NUM_THREADS": "2"}
    import os

    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    config = measured_config(zero, optimizer)
    need = estimate(config, parallel_layout(config, 1), device="cpu").total
    assert 0.65 <= measured / need <= 1.05, f"measured {measured / GIB:.2f} GiB, estimated {need / GIB:.2f} GiB"
