"""Small stand-ins for srun, sbatch and scontrol, put on PATH by slurm_cluster.py: `slurm_commands.py srun ...`.

Written from Slurm's manual pages. Options that they do not know are an error, so that a misspelt one shows. What they
leave out of the real thing is everything but: which processes start with which variables and logs, who gets which
signal, and which status comes back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])
COMMON = {"--job-name", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--output", "--open-mode"}
SRUN = COMMON | {"--ntasks", "--export", "--distribution", "--kill-on-bad-exit", "--wait"}
SBATCH = COMMON | {"--partition", "--account", "--time", "--gpus-per-node", "--exclude", "--signal", "--array"}
SBATCH |= {"--dependency", "--mem"}
FLAGS = {"--requeue", "--exclusive"}


def options(arguments: list[str], known: set[str]) -> tuple[dict[str, str], list[str]]:
    """--name=value pairs up to the first word that is none; of a repeated one the last counts."""
    found: dict[str, str] = {}
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            return found, arguments[index:]
        if not (name in known and equals) and argument not in FLAGS:
            sys.exit(f"error: unrecognized option {argument}")
        found[name] = value
    sys.exit("error: no command")


def expand(nodes: str) -> list[str]:
    """localhost,n[2-3] -> localhost n2 n3"""
    names = []
    for prefix, first, last, plain in re.findall(r"([^,\[]+)\[(\d+)-(\d+)\]|([^,\[]+)", nodes):
        names += [plain] if plain else [f"{prefix}{i}" for i in range(int(first), int(last) + 1)]
    return names


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(expand(arguments[2])))
        return 0
    if arguments[:3] == ["show", "node", "--oneliner"]:
        print(f"NodeName={arguments[3]} Arch=x86_64 NodeAddr={arguments[3]} NodeHostName={arguments[3]} Version=22.05")
        return 0
    if arguments[0] == "requeue" and len(arguments) == 2:
        (HERE / "requeued").open("a").write(arguments[1] + "\n")
        return int((HERE / "requeue_status").read_text()) if (HERE / "requeue_status").exists() else 0
    sys.exit(f"scontrol: error: {arguments}")


def sbatch(arguments: list[str]) -> int:
    """Queue the job, with a copy of its script as Slurm keeps one, for the test to start."""
    found, (script, *rest) = options(arguments, SBATCH)
    leftover = [name for name in os.environ if name.startswith("SLURM_")]
    if leftover:
        sys.exit(f"sbatch: error: options of another job in the environment: {leftover}")
    number = int((HERE / "next_job").read_text())
    (HERE / "next_job").write_text(str(number + 20))
    copy = HERE / f"slurm_script_{number}"
    shutil.copy(script, copy)
    job = {"id": number, "options": found, "script": str(copy), "arguments": rest, "cwd": os.getcwd()}
    (HERE / f"job_{number}.json").write_text(json.dumps(job))
    print(f"Submitted batch job {number}")
    return 0


class Step:
    """The tasks of one srun."""

    def __init__(self) -> None:
        self.tasks: list[subprocess.Popen[bytes]] = []
        self.asked: list[int] = []  # signals that srun has received and not yet passed on
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda received, _: self.asked.append(received))
        signal.signal(signal.SIGTERM, lambda *_: self.asked.append(signal.SIGKILL))  # `forcing job termination`

    def start(self, found: dict[str, str], command: list[str]) -> None:
        per_node = int(found["--ntasks-per-node"])
        count = int(found["--ntasks"])
        nodes = expand(os.environ["SLURM_JOB_NODELIST"])
        for rank in range(count):
            index, local = divmod(rank, per_node)  # --distribution=block
            environment = {
                **os.environ,
                **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(index)},
                **{"SLURM_NTASKS": str(count), "SLURMD_NODENAME": nodes[index]},
            }
            log = None
            if "--output" in found:
                path = re.sub(r"%(\d*)t", lambda m, rank=rank: str(rank).zfill(int(m[1] or 0)), found["--output"])
                log = open(path, "ab" if found.get("--open-mode") == "append" else "wb")  # noqa: SIM115
            self.tasks.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT if log else None,
                    start_new_session=True,
                )
            )

    def signal(self, number: int) -> None:
        for task in self.tasks:
            if task.poll() is None:
                os.killpg(task.pid, number)

    def wait(self, after_first: float, after_failure: bool) -> int:
        """The highest status of a task, 128 + n where signal n ended it."""
        first = None
        while any(task.poll() is None for task in self.tasks):
            while self.asked:
                self.signal(self.asked.pop(0))
            ended = [task.returncode for task in self.tasks if task.returncode is not None]
            first = first or (time.monotonic() if ended else None)
            if (first and after_first and time.monotonic() - first > after_first) or (after_failure and any(ended)):
                self.signal(signal.SIGKILL)
            time.sleep(0.02)
        return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in self.tasks)


def srun(arguments: list[str]) -> int:
    found, command = options(arguments, SRUN)
    assert found["--export"] == "ALL"
    assert found["--distribution"] == "block"
    step = Step()
    step.start(found, command)
    return step.wait(float(found.get("--wait", 0)), found["--kill-on-bad-exit"] == "1")


if __name__ == "__main__":
    sys.exit({"srun": srun, "sbatch": sbatch, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
