"""Start the runs of an experiment, each in a process of its own, and say what is finished."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_opus.runs.metrics import read_metrics
from megatron_opus.studies.lab.experiment import CORES, ROOT, SINGLE_PROCESS, START, PlannedRun
from megatron_opus.studies.lab.matched_shares import matched_overrides


def steps_done(run: PlannedRun) -> int:
    """Return how many steps the run has recorded."""
    rows = read_metrics(run.directory)
    return rows[-1]["step"] + 1 if rows else 0


def is_finished(run: PlannedRun) -> bool:
    """Say whether a run has recorded its last step and evaluation; a start must also have saved its last weights."""
    rows, steps = read_metrics(run.directory), run.config.training.train_steps
    saved = run.arm != START or any(run.directory.glob(f"checkpoints/step_{steps:08d}*/complete.json"))
    return saved and bool(rows) and rows[-1]["step"] + 1 >= steps and "validation_loss" in rows[-1]


def why_unfinished(run: PlannedRun) -> str:
    """Explain in one line for the report why a run is not finished; empty for a finished run."""
    if is_finished(run):
        return ""
    log = log_of(run)
    if not log.exists():
        waits = [other.name for other in run.waits_for if not is_finished(other)]
        return f"not started: {', '.join(waits)} is not finished" if waits else "not started"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    at = f"at step {steps_done(run)} of {run.config.training.train_steps}"
    errors = [line for line in lines if line.startswith(("error:", "experiment:"))]
    return f"{at}: {errors[-1] if errors else (lines[-1] if lines else 'no output')}"


def log_of(run: PlannedRun) -> Path:
    return run.directory.parent / "logs" / f"{run.name}.txt"


def run_all(
    runs: Sequence[PlannedRun],
    *,
    jobs: int,
    say: Callable[[str], object],
    minutes: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Bring every run to its end, `jobs` processes of one core at a time; a failing run does not stop the others.

    minutes: a run that takes longer is ended and counts as failed (it would resume at the next start). All processes
    are ended when this function is left, however.
    """
    waiting = [run for run in runs if not is_finished(run)]
    kept = len(runs) - len(waiting)
    if kept:
        say(f"{kept} of {len(runs)} runs are finished and kept")
    active: list[tuple[PlannedRun, subprocess.Popen[bytes], float]] = []
    try:
        while waiting or active:
            while len(active) < jobs:
                run = next((r for r in waiting if all(map(is_finished, r.waits_for))), None)
                if run is None:
                    break
                waiting.remove(run)
                say(f"{run.name}: {'resumes' if (run.directory / 'config.yaml').exists() else 'starts'}")
                active.append((run, _start(run, environment or {}), time.monotonic()))
            if not active:  # what is left waits for a run that failed
                break
            time.sleep(0.2)
            for entry in list(active):
                run, process, began = entry
                if process.poll() is None:
                    if minutes is None or time.monotonic() - began < 60 * minutes:
                        continue
                    process.kill()
                    process.wait()
                    with log_of(run).open("a", encoding="utf-8") as log:
                        log.write(f"experiment: ended after {minutes:g} minutes\n")
                active.remove(entry)
                took = time.monotonic() - began
                problem = why_unfinished(run)
                say(f"{run.name}: " + (f"FAILED {problem}" if problem else f"finished in {took:.0f} s"))
    finally:
        for _, process, _ in active:
            process.kill()
            process.wait()


def _start(run: PlannedRun, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if k not in SINGLE_PROCESS}
    path = os.pathsep.join(p for p in (str(ROOT), inherited.get("PYTHONPATH", "")) if p)
    matched = () if run.shares_of is None else matched_overrides(run.shares_of.directory)
    command = [sys.executable, "-m", "megatron_opus.training", str(run.recipe), *run.overrides, *matched]
    if (run.directory / "config.yaml").exists():
        command.append("--resume")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(log_of(run).open("wb"))
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**inherited, **CORES, "PYTHONPATH": path, **environment},
        )
