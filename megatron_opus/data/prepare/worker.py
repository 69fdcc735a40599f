"""Worker processes for preparation.

`python -m megatron_opus.data.prepare.worker` reads jobs from stdin and answers on stdout.

Plain child processes rather than `multiprocessing`: they neither fork a process with threads nor import the caller's
main script again, so that preparation may be started from a trainer, a notebook or a test.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_opus.data.prepare.document import SourceError
from megatron_opus.data.prepare.tokenize import Job, JobRunner, RecordError

_PACKAGE_ROOT = Path(__file__).resolve().parents[3]


class WorkerError(RuntimeError):
    """A worker process failed for another reason than the data."""


def run_jobs(jobs: Sequence[Job], workers: int, report: Callable[[int, int], None]) -> None:
    """Run the jobs in `workers` processes (0 or 1: in this one).

    report(bytes, tokens) is called from this thread as work advances. Raises RecordError for a malformed record,
    SourceError for a damaged file, OSError where the disk is full, WorkerError when a process dies or fails otherwise.
    """
    if workers <= 1 or len(jobs) <= 1:
        runner = JobRunner()
        for job in jobs:
            runner.run(job, report)
        return
    todo: queue.Queue[Job] = queue.Queue()
    for job in jobs:
        todo.put(job)
    answers: queue.Queue[tuple[str, Any]] = queue.Queue()
    processes = [_start() for _ in range(min(workers, len(jobs)))]
    threads = [threading.Thread(target=_serve, args=(p, todo, answers), daemon=True) for p in processes]
    try:
        for thread in threads:
            thread.start()
        left = len(jobs)
        while left:
            kind, value = answers.get()
            if kind == "progress":
                report(*value)
            elif kind == "done":
                left -= 1
            elif kind == "record":
                raise RecordError(value)
            elif kind == "source":
                raise SourceError(value)
            elif kind == "full":
                raise OSError(errno.ENOSPC, value)
            else:
                raise WorkerError(value)
    finally:
        # Also on an error or an interrupt: nobody may go on writing into a directory whose owner has left.
        for process in processes:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()
        for process in processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # unsent bytes of a job that nobody will read
                        pipe.close()


def _start() -> subprocess.Popen[str]:
    path = os.pathsep.join(p for p in (str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_opus.data.prepare.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        encoding="utf-8",
    )


def _serve(process: subprocess.Popen[str], todo: queue.Queue[Job], answers: queue.Queue[tuple[str, Any]]) -> None:
    """Feed one process until there is no job left; pass on what it says."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("worker pipes are missing")
    while True:
        try:
            job = todo.get_nowait()
        except queue.Empty:
            return
        try:
            process.stdin.write(job.dumps() + "\n")
            process.stdin.flush()
            kind = "progress"
            while kind == "progress":
                line = process.stdout.readline()
                if not line:
                    raise BrokenPipeError
                kind, value = json.loads(line)
                answers.put((kind, value))
        except (OSError, ValueError):
            code = process.wait()
            hint = " (killed: out of memory?)" if code == -9 else ""
            answers.put(("died", f"a worker ended with code {code}{hint} at {job.shard.source}; run again to resume"))
            return
        if kind != "done":
            return


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends its workers
    # Libraries that print must not spoil the protocol: their stdout becomes stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def say(kind: str, value: Any) -> None:
            out.write(json.dumps([kind, value]) + "\n")
            out.flush()

        runner = JobRunner()
        for line in sys.stdin:
            try:
                runner.run(Job.loads(line), lambda read, tokens: say("progress", [read, tokens]))
                say("done", None)
            except RecordError as error:
                say("record", str(error))
            except SourceError as error:
                say("source", str(error))
            except BrokenPipeError:
                return  # the parent is gone: leave the shard unfinished
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    say("full", f"{error.strerror}; free some space and run the same command again to resume")
                    continue
                say("failed", f"a worker failed:\n{traceback.format_exc()}")


if __name__ == "__main__":
    main()
