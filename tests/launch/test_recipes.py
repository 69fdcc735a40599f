"""`deepspeed launch/x.sh`, really typed: the recipes up to the point where a run is refused or would start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_opus.config import dump, load

ROOT = Path(__file__).resolve().parents[2]
BARE_PATH = f"{Path(sys.executable).parent}:/usr/bin:/bin"


def call(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "LOCAL_RANK", "RANK", "WORLD_SIZE")}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**kept, "PATH": BARE_PATH, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize("name", ["pretrain_gpt2_xl", "pretrain_gpt2_large", "pretrain_gpt2_tiny", "cpt_qwen3_8b"])
def test_a_dry_run_from_a_shell_shows_the_command_and_the_configuration(name: str) -> None:
    """Guards against a dry run that shows the recipe without the overrides, or values other than those of a run."""
    result = call("bash", f"launch/{name}.sh", "training.train_steps=3", DRY_RUN="1")
    command, _, shown = result.stdout.partition("\n")
    assert result.returncode == 0, result.stderr
    assert command == f"deepspeed launch/{name}.sh training.train_steps=3 "
    assert yaml.safe_load(shown)["training"]["train_steps"] == 3
    assert shown == dump(load(ROOT / "configs" / f"{name}.yaml", ["training.train_steps=3"]))


def test_a_dry_run_under_deepspeed_shows_the_configuration_once(tmp_path: Path) -> None:
    """Guards against a dry run that only works in a shell, prints once per rank, or leaves a run folder behind."""
    script = str(ROOT / "launch/pretrain_gpt2_xl.sh")
    result = call("deepspeed", "--num_gpus", "2", script, "name=dry", cwd=tmp_path, DRY_RUN="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("name: dry\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_stops_deepspeed_and_names_the_nearest() -> None:
    """Guards against a mistyped override that trains for a week with the default."""
    result = call("deepspeed", "launch/pretrain_gpt2_xl.sh", "training.train_step=1")
    assert result.returncode == 2
    assert "unknown key training.train_step; did you mean training.train_steps?" in result.stderr + result.stdout


def test_missing_data_is_said_with_the_way_to_make_it(tmp_path: Path) -> None:
    """Guards against a traceback from the first read of a data set that a fresh clone does not have."""
    script = str(ROOT / "launch/pretrain_gpt2_xl.sh")
    command = ["deepspeed", "--num_gpus", "1", "--master_port", free_port(), script]
    result = call(*command, "model.num_layers=1", cwd=tmp_path)
    said = result.stderr + result.stdout
    assert result.returncode == 2, said
    assert "data/fineweb_gpt2" in said
    assert "tools/prepare_data.py" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_too_little_memory_is_said_before_anything_is_allocated(tmp_path: Path, embedded_cache: Path) -> None:
    """Guards against an out-of-memory kill after minutes, which names no cause and no layout that would fit."""
    script = str(ROOT / "launch/pretrain_gpt2_xl.sh")
    command = ["deepspeed", "--num_gpus", "1", "--master_port", free_port(), script]
    huge = ["model.hidden_size=25600", "data=embedded", f"data.cache_dir={embedded_cache}"]  # terabytes, on any machine
    result = call(*command, *huge, cwd=tmp_path)
    said = result.stderr + result.stdout
    assert result.returncode == 2, said
    assert "GiB needed" in said
    assert "GiB found" in said
    assert "layout" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()
