"""Recipes checked for a number of ranks before they are queued."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opus.cluster import check_recipe
from megatron_opus.config import ConfigError, dump, load

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_shown_is_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a plan of another recipe than the ranks will read, by name as by path."""
    path = ROOT / "configs/cpt_qwen3_8b.yaml"
    for recipe in ("cpt_qwen3_8b", str(path)):
        assert check_recipe.main([recipe, "--ranks", "16", "seed=7"]) == 0
        assert capsys.readouterr().out == dump(load(path, ["seed=7"]))
    assert check_recipe.main(["cpt_qwen3_8b", "--ranks", "16", "--show", "name", "name=other"]) == 0
    assert capsys.readouterr().out == "other\n"


def test_ranks_that_do_not_divide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a layout that passes here and is refused by every rank a day later."""
    with pytest.raises(ConfigError, match="does not divide the 15 processes"):
        check_recipe.load("cpt_qwen3_8b", [], 15)
    assert check_recipe.main(["cpt_qwen3_8b", "--ranks", "15"]) == check_recipe.REFUSED
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: parallel.tensor_model_parallel_size: 2 does not divide the 15 processes")


def test_the_memory_of_a_gpu_can_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a job of 16 GPUs that waits a day to be refused for want of memory."""
    assert check_recipe.main(["cpt_qwen3_8b", "--ranks", "16", "--gpu-memory-gib", "80"]) == 0
    assert "GiB needed, 80.00 GiB found (GPU_MEMORY_GIB" in capsys.readouterr().err
    assert check_recipe.main(["cpt_qwen3_8b", "--ranks", "16", "--gpu-memory-gib", "16"]) == check_recipe.REFUSED
    assert "the recipe does not fit this machine" in capsys.readouterr().err


def test_a_login_node_needs_no_torch() -> None:
    """Guards against a submission that fails, or takes half a minute, where only PyYAML is installed."""
    code = (
        "import sys\n"
        "from megatron_opus.cluster.check_recipe import main\n"
        "assert main(['pretrain_gpt2_xl', '--ranks', '8', '--show', 'name']) == 0\n"
        "assert not {'torch', 'numpy', 'megatron', 'deepspeed'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "pretrain_gpt2_xl\n"), result.stderr
