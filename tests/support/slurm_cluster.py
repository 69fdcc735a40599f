"""A cluster of this machine for the scripts in launch/slurm/: commands on PATH, and a test that plays slurmctld."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PORTS, RESTARTS = 12000, 6
# What a user's shell or a scheduler around the tests may have set
FOREIGN = (
    "SLURM_",
    "SBATCH_",
    "SITE",
    "CONTAINER_",
    "MAX_",
    "HEALTH_",
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "OMP_",
)

SITE = """
PARTITION=${{PARTITION-test}} TIME=${{TIME-10}} PYTHON=${{PYTHON-{python}}} SUBMIT_PYTHON={python}
GPU_OPTION=${{GPU_OPTION-}} MIN_DISK_GIB=0 HEALTH_IMPORTS=${{HEALTH_IMPORTS-yaml}} HEALTH_TIMEOUT=${{HEALTH_TIMEOUT-60}}
"""


@dataclass
class Start:
    """One start of a job: its process and what it has said."""

    process: subprocess.Popen[bytes]
    output: Path
    options: dict[str, str]

    def wait(self, seconds: float = 120.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"the job did not end: {self.said()}") from None

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def reach(self, condition: Callable[[], bool], seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended early: {self.said()}"
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def near_the_time_limit(self) -> None:
        """The signal of --signal, to the batch shell alone where it asks for that with B:."""
        who, _, rest = self.options["--signal"].rpartition(":")
        assert who == "B", "the steps would get it too, and then twice"
        os.kill(self.process.pid, getattr(signal, f"SIG{rest.partition('@')[0]}"))

    def cancel(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)  # the batch script and its srun


class Cluster:
    def __init__(self, folder: Path, nodes: str = "localhost") -> None:
        self.folder, self.nodes = folder, nodes
        (folder / "bin").mkdir(parents=True)
        for name in ("srun", "sbatch", "scontrol"):
            self.command(name, f'exec {sys.executable} {ROOT}/tests/support/slurm_commands.py {name} "$@"\n')
        self.site = folder / "site.sh"
        self.site.write_text(SITE.format(python=sys.executable))
        (folder / "next_job").write_text(str(_job_with_free_ports()))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment.update(PATH=path, STAND_IN=str(folder), SITE_FILE=str(self.site), PYTHONPATH=str(ROOT))

    def command(self, name: str, body: str) -> Path:
        """A shell script on the cluster's PATH."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}")
        path.chmod(0o755)
        return path

    def submit(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "launch/slurm" / script), *arguments],
            cwd=self.folder,
            env={**self.environment, **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def jobs(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("job_*.json"))]

    def requeued(self) -> list[str]:
        """What `scontrol requeue` was given, once."""
        path = self.folder / "requeued"
        words = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return words

    def start(self, restart: int = 0, index: int | None = None, job: dict[str, Any] | None = None) -> Start:
        """Start the newest job, or one run of its array, as slurmd would."""
        job = job or self.jobs()[-1]
        number, found = job["id"], job["options"]
        environment = {**self.environment, "SLURM_JOB_NODELIST": self.nodes, "SLURM_JOB_ID": str(number)}
        output = found["--output"].replace("%j", str(number)).replace("%A", str(number)).replace("%a", str(index))
        if restart:  # not set at the first start
            environment["SLURM_RESTART_COUNT"] = str(restart)
        if index is not None:
            last = int(found["--array"].partition("%")[0].rpartition("-")[2])
            environment["SLURM_JOB_ID"] = str(number if index == last else number + 1 + index)
            environment.update(SLURM_ARRAY_JOB_ID=str(number), SLURM_ARRAY_TASK_ID=str(index))
        with open(output, "ab" if found["--open-mode"] == "append" else "wb") as stream:
            process = subprocess.Popen(
                ["bash", job["script"], *job["arguments"]],
                cwd=job["cwd"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        return Start(process, Path(output), found)


def _job_with_free_ports() -> int:
    """A job id whose rendezvous ports (job.sh derives them from it) nobody listens at now."""
    while True:
        number = random.SystemRandom().randrange(100_000, 900_000)
        try:
            for restart in range(RESTARTS):
                with socket.socket() as s:
                    s.bind(("", 20000 + (number + 101 * restart) % PORTS))
            return number
        except OSError:
            continue
