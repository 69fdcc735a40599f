"""`megatron-opus COMMAND`, and the files in tools/ that start the same commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opus.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "deepspeed", "megatron.core", "transformers", "matplotlib")


def call(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT, env=env)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_no_library(command: str) -> None:
    """Guards against a `--help`, or a mistyped option, that takes the seconds of torch; and a command without help."""
    argv = [*command.split(), "--help"]
    code = f"""
import sys
from megatron_opus.cli import main
try:
    main({argv})
except SystemExit as end:
    assert not end.code
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
"""
    done = call("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {' '.join(['megatron-opus', *command.split()])} ")


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a command that nobody can find."""
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out.splitlines()
    modules = {path.stem.replace("_", "-") for path in (ROOT / "megatron_opus/cli").glob("[a-z]*.py")}
    assert modules == set(COMMANDS)
    assert all(any(line.split()[:1] == [name] and len(line.split()) > 2 for line in listed) for name in modules)
    with pytest.raises(SystemExit):
        main(["reprot"])
    assert "reprot" in capsys.readouterr().err


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("[a-z]*.py")))
def test_a_tool_is_its_command(tool: str) -> None:
    """Guards against usage text that names another program than the one that was started, and two parsers."""
    command = tool.removesuffix(".py").replace("_", "-")
    started, other = call(f"tools/{tool}", "--help"), call("-m", "megatron_opus", command, "--help")
    assert started.returncode == other.returncode == 0, started.stderr + other.stderr
    assert started.stdout.startswith(f"usage: python tools/{tool} ")
    assert f"megatron-opus {command}" not in started.stdout
    assert f"tools/{tool}" not in other.stdout


def test_a_tool_without_the_package_says_what_to_install() -> None:
    """Guards against a traceback in a clone that was not installed."""
    done = call("-S", "tools/report.py", "--help", PYTHONPATH="")  # -S: without site-packages
    assert done.returncode == 1
    assert "pip install -e ." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_by_the_command(tmp_path: Path) -> None:
    """Guards against `train` that loses overrides, or its own statuses in those of the other commands."""
    recipe = "configs/pretrain_gpt2_tiny.yaml"
    done = call("-m", "megatron_opus", "train", recipe, "--dry-run", "name=by_command", f"runs={tmp_path}")
    assert done.returncode == 2, done.stderr
    done = call("-m", "megatron_opus", "train", recipe, "--dry-run", "name=by_command")
    assert done.returncode == 0, done.stderr
    assert "name: by_command\n" in done.stdout
