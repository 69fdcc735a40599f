"""A real Slurm on this one machine: slurmctld, and slurmd twice, as nodes n1 and n2, on free ports, in one folder.

The nodes' names resolve to nothing, as on many clusters: only Slurm knows their addresses, 127.0.0.1 and 127.0.0.2.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import FOREIGN, ROOT, SITE

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sdiag", "sinfo")
ADDRESSES = {"n1": "127.0.0.1", "n2": "127.0.0.2"}
PATIENCE = 300.0  # seconds; a machine may be busy
MARK = "SLURM_CONF"  # in the environment of every process of this cluster, with its own value

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=5
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
"""


class RealSlurm:
    """`submit` as a user would; `signal` and `lose` are what befalls a job."""

    def __init__(self) -> None:
        """Start the daemons and wait until both nodes are idle. Skips the test where none can be started."""
        # Debian keeps the daemons where only root's PATH looks
        self._path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        missing = [name for name in COMMANDS if shutil.which(name, path=self._path) is None]
        if missing:
            pytest.skip(f"no Slurm here ({', '.join(missing)} not found): apt-get install slurm-wlm munge")
        if os.getuid() != 0:
            pytest.skip("Slurm's daemons start jobs as their users, which only root may")
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets have names of at most 107 characters
        self.folder.chmod(0o755)
        self.site = self.folder / "site.sh"
        self.site.write_text(SITE.format(python=sys.executable))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        self.environment.update(PATH=self._path, SITE_FILE=str(self.site), PYTHONPATH=str(ROOT))
        self.environment[MARK] = str(self.folder / "slurm.conf")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._outputs: list[Path] = []  # folders with the output of jobs
        try:
            self._configure()
            self._munge()
            self._start("slurmctld", "slurmctld", "-D")
            for node in ADDRESSES:
                self.restore(node)
        except AssertionError as error:
            self.close()
            pytest.skip(f"Slurm is installed, but could not be started: {error}")

    def _configure(self) -> None:
        ports = _free_ports(1 + len(ADDRESSES))
        lines = CONFIGURATION.format(
            host=socket.gethostname(),
            user=pwd.getpwuid(os.getuid()).pw_name,
            controller=ports.pop(),
            folder=self.folder,
        )
        cores = os.cpu_count() or 1
        for node, address in ADDRESSES.items():
            lines += f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr={address} Port={ports.pop()} "
            lines += f"CPUs={cores} RealMemory=1000\n"
            (self.folder / node).mkdir()
        lines += "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(lines.lstrip())

    def _munge(self) -> None:
        key, sock = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = {"--key-file": key, "--socket": sock}
        names |= {f"--{name}-file": self.folder / f"munge.{name}" for name in ("log", "pid", "seed")}
        self._start("munged", "munged", "--foreground", "--force", *(f"{k}={v}" for k, v in names.items()))
        self.reach(sock.exists, "munged opens its socket", 30)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as stream:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment | {"NODE": name}, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL
            )

    # --- a user's side ----------------------------------------------------------------------------------------------

    def call(self, *command: str, **env: str) -> str:
        """What a command says. Its failure fails the test."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, *arguments: str, **env: str) -> int:
        """Run a script of launch/slurm/; the id of the job that it submitted."""
        said = self.call("bash", str(ROOT / "launch/slurm" / script), *arguments, **env)
        found = re.search(r"Submitted batch job (\d+)\nLogs, settings and the record of starts: (.*)", said)
        assert found, said
        self._outputs.append(Path(found[2]))
        return int(found[1])

    def job(self, number: int | str) -> dict[str, str]:
        """`scontrol show job` as names and values."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", str(number))))

    def reach(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, process in self._daemons.items() if process.poll() is not None]
            assert not ended, f"{ended} ended while waiting until {what}: {self._logs()}"
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}: {self._logs()}"
            time.sleep(0.1)

    def again(self, job: int | str, restart: int, **changes: str) -> None:
        """Wait until a job has been requeued, and spare it the two minutes that Slurm lets it wait."""
        found: dict[str, str] = {}

        def requeued() -> bool:
            found.update(self.job(job))
            return found["Restarts"] == str(restart) and found["JobState"] in ("PENDING", "RUNNING")

        self.reach(requeued, f"job {job} is requeued for start {restart + 1}")
        if found["JobState"] == "PENDING":
            time.sleep(3)  # a start in the second of the requeue would find the job's credential revoked
            # Slurm goes on for a while to tell a lost node that the job has ended. When the node answers after the next
            # start has begun, Slurm takes it out of that start, whose steps then wait for it without an end.
            self.reach(self._silent, "slurmctld has no message under way to a node")
            values = (f"{name}={value}" for name, value in changes.items())
            self.call("scontrol", "update", f"JobId={job}", *values, "StartTime=now")

    def _silent(self) -> bool:
        counts = re.findall(r"Agent (?:queue size|count): +(\d+)", self.call("sdiag"))
        assert counts, "sdiag does not count the agents of slurmctld, which send its messages"
        return set(counts) == {"0"}

    # --- what befalls a job -----------------------------------------------------------------------------------------

    def ranks(self, node: str) -> list[int]:
        """Process ids of the trainers on a node."""
        found = []
        for pid, environment in self._processes():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            here = environment.get(b"SLURMD_NODENAME") == node.encode() and b"RANK" in environment
            if here and any(word.endswith(b"/launch/start.py") for word in command):
                found.append(pid)
        return found

    def lose(self, node: str) -> None:
        """End everything on a node at once, as a power cut does."""
        self._daemons.pop(node).kill()
        for pid, environment in self._processes():
            if node.encode() in (environment.get(b"NODE"), environment.get(b"SLURMD_NODENAME")):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def restore(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)
        idle = lambda: self.call("sinfo", "-h", "-n", node, "-o", "%t").strip() in ("idle", "mix", "alloc")  # noqa: E731
        self.reach(idle, f"{node} is up")

    def _processes(self) -> list[tuple[int, dict[bytes, bytes]]]:
        """Every process of this cluster but its users', with its environment."""
        mark, found = os.fsencode(self.environment[MARK]), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                pairs = (pair.partition(b"=") for pair in path.read_bytes().split(b"\0"))
                environment = {name: value for name, _, value in pairs}
                if environment.get(MARK.encode()) == mark:
                    found.append((int(path.parent.name), environment))
        return found

    def _logs(self) -> str:
        """The end of every log, those of the jobs first."""
        logs = [path for folder in (*self._outputs, self.folder) for path in sorted(folder.glob("*.out"))]
        logs += sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-1500:]}" for path in logs)

    def close(self) -> None:
        """End every process of this cluster and remove its folder."""
        for process in reversed(self._daemons.values()):
            process.terminate()
        for pid, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._daemons.values():
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
