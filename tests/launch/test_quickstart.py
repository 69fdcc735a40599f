"""launch/quickstart.sh and launch/install.sh with stand-ins for pip and deepspeed: what they start, skip and say."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BARE_PATH = "/usr/bin:/bin"

# The environment's python: pip and torch are told of in a file, everything else is real.
PYTHON = f"""#!/bin/sh
case "$*" in
  *"-m pip --version"*) exit "${{BROKEN_PIP:-0}}" ;;
  *"-m pip"*) echo "pip $*" >>"$CALLS"; exit "${{PIP_STATUS:-0}}" ;;
  *"import torch"*) echo 2 ;;
  *compare_runs*) echo "compare $*" >>"$CALLS" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
DEEPSPEED = """#!/bin/sh
echo "deepspeed $*" >>"$CALLS"
if [ -n "${HANG:-}" ]; then
  sleep 60 &
  echo $! >"$HANG"
  wait
fi
exit "${RUN_STATUS:-0}"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose .venv holds the stand-ins."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    (root / ".venv/bin").mkdir(parents=True)
    for name, text in (("python", PYTHON), ("python3", PYTHON), ("deepspeed", DEEPSPEED)):
        (root / ".venv/bin" / name).write_text(text)
        (root / ".venv/bin" / name).chmod(0o755)
    return root


def environment(root: Path, **env: str) -> dict[str, str]:
    return {"PATH": BARE_PATH, "HOME": str(root), "CALLS": str(root / "calls"), **env}


def call(root: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `command` from elsewhere, as a user with another working directory would."""
    return subprocess.run(
        ["bash", str(root / command[0]), *command[1:]],
        cwd="/",
        env=environment(root, **env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def calls(root: Path, what: str) -> list[str]:
    """Calls of the stand-in `what` since the last time this was asked."""
    path = root / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line for line in lines if line.startswith(what)]


# --- the environment ------------------------------------------------------------------------------------------------


def test_torch_is_pinned_and_comes_first(clone: Path) -> None:
    """Guards against a dependency pulling another build of torch, gigabytes larger, before the pinned one."""
    result = call(clone, "launch/install.sh", "test", TORCH_INDEX_URL="https://example.org/cpu")
    assert result.returncode == 0, result.stderr
    first, second = calls(clone, "pip")
    assert "--index-url https://example.org/cpu torch==" in first
    assert "-c constraints.txt -e .[test]" in second
    assert "--index-url" not in second


def test_nothing_is_installed_twice(clone: Path) -> None:
    """Guards against a second start that waits for pip, and against one that misses changed pins."""
    assert call(clone, "launch/install.sh", "test").returncode == 0
    assert len(calls(clone, "pip")) == 2
    for extra in ("test", ""):  # the test extra brings everything that training needs
        assert call(clone, "launch/install.sh", *filter(None, [extra])).returncode == 0
    assert not calls(clone, "pip")
    with (clone / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert call(clone, "launch/install.sh").returncode == 0
    assert len(calls(clone, "pip")) == 2
    assert call(clone, "launch/install.sh", "test").returncode == 0
    assert len(calls(clone, "pip")) == 2  # the changed pins have not been installed with the extra yet


def test_a_failed_installation_is_not_taken_for_a_complete_one(clone: Path) -> None:
    """Guards against a stamp that is written before pip is done: every later start would fail at an import."""
    result = call(clone, "launch/install.sh", PIP_STATUS="1")
    assert result.returncode == 1
    assert "torch could not be installed" in result.stderr
    calls(clone, "pip")
    assert call(clone, "launch/install.sh").returncode == 0
    assert len(calls(clone, "pip")) == 2


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        ('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; *) echo Python 3.9.1;; esac\n', "got Python 3.9.1"),
        ('#!/bin/sh\ncase "$*" in *venv*) exit 1;; *) exit 0;; esac\n', "apt install python3-venv"),
        (None, "not found. Install Python 3.10 or later"),
    ],
)
def test_a_python_that_will_not_do_is_said(clone: Path, python: str | None, expected: str) -> None:
    """Guards against a syntax error from an old Python, or a bare failure of venv, as the first thing a user sees."""
    shutil.rmtree(clone / ".venv")
    if python is not None:
        (clone / "python").write_text(python)
        (clone / "python").chmod(0o755)
    result = call(clone, "launch/install.sh", PYTHON=str(clone / "python"))
    assert result.returncode == 1
    assert expected in result.stderr
    assert not calls(clone, "pip")


# --- the runs -------------------------------------------------------------------------------------------------------


def test_the_quickstart_trains_over_two_ranks_with_the_overrides_last(clone: Path) -> None:
    """Guards against overrides that the script's own settings overrule, and a summary that names another folder."""
    result = call(clone, "launch/quickstart.sh", "training.train_steps=3", "output_dir=out", "name=mine")
    assert result.returncode == 0, result.stderr
    (one,) = calls(clone, "deepspeed")
    assert one.startswith("deepspeed --quiet --num_gpus 2 --master_port ")
    script, *settings = one.split()[6:]
    assert script == "launch/pretrain_gpt2_tiny.sh"
    assert " ".join(settings) == "parallel.tensor_model_parallel_size=2 training.train_steps=3 output_dir=out name=mine"
    for file in ("out/mine", "metrics.jsonl", "ledger/", "config.yaml", "tensorboard --logdir out"):
        assert file in result.stdout


def test_two_quickstarts_do_not_share_a_folder(clone: Path) -> None:
    """Guards against a second start that is refused because the first one's folder is there."""
    names = []
    for _ in range(2):
        assert call(clone, "launch/quickstart.sh").returncode == 0
        names.append(calls(clone, "deepspeed")[0].split()[-1])
        time.sleep(1)
    assert names[0] != names[1]


def test_compare_trains_both_arms_alike(clone: Path) -> None:
    """Guards against a baseline with other settings than the run it is compared with."""
    result = call(clone, "launch/quickstart.sh", "--compare", "training.train_steps=3", "name=x")
    assert result.returncode == 0, result.stderr
    opus, random = (line.split()[6:] for line in calls(clone, "deepspeed"))
    assert opus[-1] == "name=x"
    assert random == [*opus[:-1], "name=x-random", "selection.strategy=random"]


def test_a_failed_run_is_a_failed_quickstart(clone: Path) -> None:
    """Guards against `everything is in runs/` after a run that ended half way."""
    result = call(clone, "launch/quickstart.sh", "--compare", "name=x", RUN_STATUS="4")
    assert result.returncode == 4
    assert len(calls(clone, "deepspeed")) == 1
    assert "Everything of this run" not in result.stdout
    assert "the run x ended with status 4" in result.stderr


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interruption_ends_every_process_and_says_how_to_go_on(clone: Path, sent: signal.Signals) -> None:
    """Guards against ranks that train on, unseen, after the quickstart was stopped."""
    pid_file = clone / "pid"
    process = subprocess.Popen(
        ["bash", str(clone / "launch/quickstart.sh"), "name=x", "seed=2"],
        env=environment(clone, HANG=str(pid_file)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell cannot trap a signal that was ignored when it started, as SIGINT is for commands in the background and
        # SIGHUP under nohup
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),  # noqa: PLW1509, no threads here
    )
    deadline = time.monotonic() + 300
    while not (pid_file.exists() and pid_file.read_text().strip()):
        assert time.monotonic() < deadline, "the run never started"
        time.sleep(0.05)
    os.kill(process.pid, sent)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "./launch/quickstart.sh name=x seed=2 --resume \n" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
