"""The launch scripts, with a stand-in for the trainer: which command starts what, with which arguments and status."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
POLYGLOTS = sorted(p for kind in ("pretrain", "cpt") for p in (ROOT / "launch").glob(f"{kind}_*.sh"))
OWN_SITES = {*(ROOT / "launch/env").glob("*.sh")} - {ROOT / "launch/env/example.sh"}
SCRIPTS = [*sorted({*(ROOT / "launch").rglob("*.sh")} - OWN_SITES), ROOT / "tests/run.sh", ROOT / ".ci/run"]
TOOLS = Path(sys.executable).parent  # deepspeed and shellcheck of the environment that runs the tests
BARE_PATH = "/usr/bin:/bin"

STAND_IN = """
import json, multiprocessing, os, sys, time

def square(x):
    return x * x

def main(config, argv):
    if "spawn" in argv:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.map(square, [3]) == [9]
    keys = ("OMP_NUM_THREADS", "RANK", "LOCAL_SIZE")
    said = {k: os.environ.get(k) for k in keys}
    said.update(config=str(config), argv=list(argv), python=sys.executable, root=sys.path[0])
    sys.stdout.write("SAID " + json.dumps(said) + "\\n")  # one write, for another rank writes as well
    if "late" in argv and os.environ["RANK"] == "0":
        time.sleep(3)
        print("RANK 0 SAYS WHY", flush=True)
    return int(os.environ.get("STAND_IN_STATUS", "0"))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real launch folder, a trainer that says how it was called, and a fake `deepspeed` in bin/."""
    root = tmp_path / "check out"  # a blank in the path, as some home folders have
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "megatron_opus/training").mkdir(parents=True)
    (root / "megatron_opus/training/main.py").write_text(STAND_IN)
    for used in ("ranks/launchers.py", "runs/processes.py"):
        (root / "megatron_opus" / used).parent.mkdir()
        shutil.copy(ROOT / "megatron_opus" / used, root / "megatron_opus" / used)
    (root / "bin").mkdir()
    fake = root / "bin/deepspeed"
    fake.write_text('#!/bin/sh\nfor a in deepspeed "$@"; do printf "<%s>" "$a"; done\nexit 9\n')
    fake.chmod(0o755)
    return root


def call(*command: str | Path, cwd: Path, path: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "LOCAL_RANK", "RANK", "PYTHONPATH")}
    kept["PATH"] = path if path is not None else f"{cwd / 'bin'}:{BARE_PATH}"
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**kept, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def said(output: str) -> list[dict[str, Any]]:
    return [json.loads(m) for m in re.findall(r"^SAID (\{.*\})$", output, flags=re.MULTILINE)]


# --- as text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_bash_accepts_every_script(script: Path) -> None:
    """Guards against a script that fails half way, at the first line that bash cannot parse."""
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    """Guards against unquoted expansions and their kin."""
    shellcheck = shutil.which("shellcheck", path=f"{TOOLS}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck here; the test extra installs it")
    result = subprocess.run([shellcheck, *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", POLYGLOTS, ids=lambda p: p.name)
def test_a_polyglot_is_python_and_names_its_own_recipe(script: Path) -> None:
    """Guards against a copied script that starts another model, and against three quotes in its shell half."""
    source = script.read_text()
    compile(source, str(script), "exec")
    assert re.findall(r'start\("([^"]*)"\)', source) == [script.stem]
    assert (ROOT / "configs" / f"{script.stem}.yaml").is_file()
    assert re.findall(r"configs/\S+?\.yaml", source) == [f"configs/{script.stem}.yaml"]
    assert os.access(script, os.X_OK)


def test_the_polyglots_differ_in_names_only() -> None:
    """Guards against values that hide in one script instead of its recipe."""
    bodies = {re.sub(r"# (Pre-trains|Continues) .*", "", p.read_text().replace(p.stem, "RECIPE")) for p in POLYGLOTS}
    assert len(bodies) == 1


# --- from a shell ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (["bash", "launch/pretrain_gpt2_tiny.sh"], "."),
        (["sh", "launch/pretrain_gpt2_tiny.sh"], "."),
        (["./launch/pretrain_gpt2_tiny.sh"], "."),
        (["bash", "pretrain_gpt2_tiny.sh"], "launch"),
        (["{root}/launch/pretrain_gpt2_tiny.sh"], "/"),
    ],
)
def test_a_shell_starts_deepspeed_with_the_arguments_unharmed(checkout: Path, command: list[str], folder: str) -> None:
    """Guards against lost or re-split arguments, a lost exit status, and a script tied to one working directory."""
    script = command[-1] = command[-1].replace("{root}", str(checkout))
    result = call(*command, "a=b c", "--resume", "", cwd=checkout / folder, path=f"{checkout / 'bin'}:{BARE_PATH}")
    assert result.stdout == f"<deepspeed><{script}><a=b c><--resume><>"
    assert result.returncode == 9


def test_launcher_options_come_from_the_environment(checkout: Path) -> None:
    """Guards against no way to pass --num_gpus when the script, not deepspeed, is what is typed."""
    script = "launch/pretrain_gpt2_tiny.sh"
    result = call("bash", script, "x=1", cwd=checkout, DEEPSPEED_ARGS="--num_gpus 2  --master_port 1")
    assert result.stdout == f"<deepspeed><--num_gpus><2><--master_port><1><{script}><x=1>"


def test_the_environment_of_the_checkout_is_found(checkout: Path) -> None:
    """Guards against `bash launch/x.sh` failing right after the quickstart because .venv is not activated."""
    (checkout / ".venv").mkdir()
    (checkout / "bin").rename(checkout / ".venv/bin")
    result = call("bash", "launch/pretrain_gpt2_tiny.sh", cwd=checkout, path=BARE_PATH)
    assert (result.returncode, result.stdout) == (9, "<deepspeed><launch/pretrain_gpt2_tiny.sh>")


def test_a_missing_deepspeed_is_said(checkout: Path) -> None:
    """Guards against a bare `deepspeed: command not found`."""
    result = call("bash", "launch/pretrain_gpt2_tiny.sh", cwd=checkout, path=BARE_PATH)
    assert result.returncode == 127
    assert "expected on PATH or in" in result.stderr
    assert "launch/quickstart.sh" in result.stderr


def test_a_dry_run_prints_a_command_that_can_be_pasted(checkout: Path) -> None:
    """Guards against a dry run that trains, or prints a command whose quotes are lost."""
    result = call("bash", "launch/pretrain_gpt2_tiny.sh", "a=b c", cwd=checkout, DRY_RUN="1", STAND_IN_STATUS="3")
    assert result.stdout.splitlines()[0] == "deepspeed launch/pretrain_gpt2_tiny.sh a=b\\ c "
    assert said(result.stdout)[0]["argv"] == ["a=b c", "--dry-run"]
    assert result.returncode == 3  # what the trainer thinks of the configuration


def test_a_launcher_that_executes_the_script_gets_python(checkout: Path) -> None:
    """Guards against `deepspeed --no_python` starting deepspeed again in every rank, and with another interpreter."""
    (checkout / "bin/python3").symlink_to(sys.executable)
    result = call("./launch/pretrain_gpt2_tiny.sh", "--local_rank=1", cwd=checkout, LOCAL_RANK="1")
    (one,) = said(result.stdout)
    assert one["argv"] == ["--local_rank=1"]
    assert one["python"] == str(checkout / "bin/python3")


# --- from Python ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", POLYGLOTS, ids=lambda p: p.name)
def test_python_reaches_the_trainer(checkout: Path, script: Path) -> None:
    """Guards against the wrong recipe, an installed package taking the place of the checkout's, and a lost status."""
    file = f"launch/{script.name}"
    result = call(sys.executable, file, "a=b c", "spawn", cwd=checkout, STAND_IN_STATUS="5", DRY_RUN="0")
    (one,) = said(result.stdout)  # `spawn` imports the script again in a worker, which must not train
    assert one["config"] == str(checkout / "configs" / f"{script.stem}.yaml")
    assert (one["argv"], one["root"]) == (["a=b c", "spawn"], str(checkout))
    assert result.returncode == 5


@pytest.mark.parametrize(
    ("env", "threads"),
    [({"LOCAL_SIZE": "1"}, None), ({"LOCAL_SIZE": "100000"}, "1"), ({"LOCAL_SIZE": "1", "OMP_NUM_THREADS": "3"}, "3")],
)
def test_threads_are_shared_among_local_ranks(checkout: Path, env: dict[str, str], threads: str | None) -> None:
    """Guards against ranks that spin on each other's cores, many times slower, and against overruling the user."""
    result = call(sys.executable, "launch/pretrain_gpt2_tiny.sh", cwd=checkout, **env)
    assert said(result.stdout)[0]["OMP_NUM_THREADS"] == (threads or str(len(os.sched_getaffinity(0))))


@pytest.mark.parametrize("option", [[], ["--no_python"]])
def test_deepspeed_starts_two_ranks_and_reports_their_failure(checkout: Path, option: list[str]) -> None:
    """Guards against `deepspeed launch/x.sh` dying with a SyntaxError, and against status 0 for a failed run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = ["deepspeed", "--num_gpus", "2", "--master_port", port, *option, "launch/pretrain_gpt2_tiny.sh", "a=b c"]
    path = f"{TOOLS}:{BARE_PATH}"
    result = call(*command, cwd=checkout, path=path)
    ranks = sorted(said(result.stdout), key=lambda one: one["RANK"])
    assert result.returncode == 0, result.stderr
    assert [one["argv"] for one in ranks] == [["--local_rank=0", "a=b c"], ["--local_rank=1", "a=b c"]]
    assert {one["OMP_NUM_THREADS"] for one in ranks} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert {Path(one["python"]).parent for one in ranks} == {TOOLS}
    if not option:
        result = call(*command, "late", cwd=checkout, path=path, STAND_IN_STATUS="2")
        assert result.returncode == 2
        assert "RANK 0 SAYS WHY" in result.stdout  # although rank 1 was done long before
