"""Check the nodes of a job before its ranks start, and name those that are not fit.

A job runs `python -m megatron_opus.cluster.health` once on every node. Each node looks at itself: its packages, its
GPUs, its disk, and the folder that all nodes must share. Then it calls the first node, on the address and port at which
the ranks will meet later. The first node compares the reports. It prints one line per fault, with the name of the node,
and writes `health.json` into the folder; where a node failed, it also writes `bad_nodes`. The exchange:

    first node                                 every other node
    shared-<token> into the folder, listen
                                               checks itself; connects; says its name
    its clock and the token              ->    offset of the clocks; waits for shared-<token> to be visible
                                         <-    its report; seen-<node> in the folder

The exit status is 0 when all nodes are fit, 1 when some are not, and 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opus.cluster import node
from megatron_opus.files import write_json, write_text

REPORT, BAD_NODES = "health.json", "bad_nodes"
LONGEST_LINE = 1 << 20  # bytes: more comes from no report, but from something else that found the port
RETRY_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Holds what the job needs of its nodes.

    A network file system may hide a new file from other nodes for up to `shared_seconds`.
    """

    nodes: tuple[str, ...]
    address: str
    port: int
    directory: Path
    output_dir: Path
    gpus: int
    min_gpu_free: float
    min_disk_gib: float
    max_clock_skew: float  # seconds
    timeout: float  # seconds
    imports: tuple[str, ...]
    shared_seconds: float = 75.0


@dataclass
class Reports:
    """Collects the reports that arrive at the first node. One thread per calling node fills it."""

    by_node: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, report: dict[str, Any]) -> None:
        with self.changed:
            self.by_node[report["node"]] = report
            self.changed.notify_all()

    def wait(self, nodes: Sequence[str], seconds: float) -> None:
        """Wait until all `nodes` have reported, for at most so many seconds."""
        with self.changed:
            self.changed.wait_for(lambda: all(name in self.by_node for name in nodes), seconds)


# --- the first node -------------------------------------------------------------------------------------------------


def first_node(me: str, expected: Expected) -> int:
    """Compare the reports of all nodes and return the exit status."""
    started = time.monotonic()
    token = secrets.token_hex(8)
    expected.directory.mkdir(parents=True, exist_ok=True)
    reports = Reports()
    faults: list[str] = []
    listener = None
    try:
        listener = _listen(expected.port, len(expected.nodes))
    except OSError as error:
        faults.append(f"cannot listen at port {expected.port}, where the ranks are to meet: {error}")
    if listener is not None:
        threading.Thread(target=_accept, args=(listener, token, reports), daemon=True).start()
        faults += _call_oneself(expected, token)
    (expected.directory / f"shared-{token}").touch()
    own = node.report(me, expected)
    own["faults"] = [*faults, *own["faults"]]
    reports.add(own)
    if listener is not None:
        reports.wait(expected.nodes, expected.timeout - (time.monotonic() - started))
    found = judge(reports.by_node, expected, called=listener is not None)
    give_up = time.monotonic() + expected.shared_seconds
    for name in expected.nodes[1:]:
        seen = expected.directory / f"seen-{name}-{token}"
        if name in reports.by_node and not found[name] and not _appears(seen, give_up - time.monotonic()):
            found[name].append(
                f"what it wrote to {expected.directory} is not visible on {me}: not the same file system"
            )
    _write(expected, reports.by_node, found)
    bad = [name for name, lines in found.items() if lines]
    for name in bad:
        for line in found[name]:
            print(f"health check: {name}: {line}", file=sys.stderr)
    took = time.monotonic() - started
    print(f"health check: {len(found) - len(bad)} of {len(found)} nodes are fit ({took:.0f} s)", file=sys.stderr)
    return 1 if bad else 0


def judge(reports: Mapping[str, Mapping[str, Any]], expected: Expected, called: bool = True) -> dict[str, list[str]]:
    """List for every node what is wrong with it: its own faults, its silence, what differs from most other nodes.

    `called` tells whether the first node could be called at all. If it could not, the silence of the others is not
    their fault. Example: three of four nodes have torch 2.13.0 and one has 2.12.0; the one is listed.
    """
    found: dict[str, list[str]] = {name: [] for name in expected.nodes}
    # in the order of the nodes, so that of two opinions the first node's counts
    compared = {n: reports[n]["software"] for n in expected.nodes if n in reports and reports[n]["software"]}
    usual = {
        key: Counter(software[key] for software in compared.values() if key in software).most_common(1)[0][0]
        for key in dict.fromkeys(key for software in compared.values() for key in software)
    }
    for name in expected.nodes:
        report = reports.get(name)
        if report is None:
            if called:
                found[name].append(
                    f"no report within {expected.timeout:g} s: its Python did not start, or it cannot reach "
                    f"{expected.address}:{expected.port} on {expected.nodes[0]}; its own lines, if any, are above"
                )
            continue
        found[name] += report["faults"]
        for key, value in usual.items() if name in compared else ():
            if (mine := compared[name].get(key)) != value:
                found[name].append(f"{key} is {mine}, other nodes have {value}")
        # half of the time on the way is the error of the offset
        offset, doubt = report["clock_offset"], report["round_trip"] / 2
        if abs(offset) - doubt > expected.max_clock_skew:
            side = "behind" if offset > 0 else "ahead of"
            found[name].append(
                f"its clock is {abs(offset):.1f} s {side} that of {expected.nodes[0]}, expected at most "
                f"{expected.max_clock_skew:g} s (MAX_CLOCK_SKEW)"
            )
    for name in reports:
        if name not in found:
            found[name] = [f"reported, but is not one of the job's nodes: {', '.join(expected.nodes)}"]
    return found


def _write(expected: Expected, reports: Mapping[str, Any], found: Mapping[str, list[str]]) -> None:
    nodes = {name: {**reports.get(name, {}), "faults": lines} for name, lines in found.items()}
    write_json(expected.directory / REPORT, {"nodes": nodes})
    bad = [name for name, lines in found.items() if lines]
    if bad:
        write_text(expected.directory / BAD_NODES, ",".join(bad) + "\n")


def _listen(port: int, nodes: int) -> socket.socket:
    """Listen at every address of this machine, as the rendezvous of the ranks will."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=nodes)
    return socket.create_server(("", port), backlog=nodes)


def _call_oneself(expected: Expected, token: str) -> list[str]:
    """Call the address that the other nodes use; list what is wrong when it does not lead to this node."""
    where = f"{expected.address}:{expected.port}"
    try:
        with (
            socket.create_connection((expected.address, expected.port), timeout=min(30.0, expected.timeout)) as line,
            line.makefile("rwb") as stream,
        ):
            _send(stream, {"greeting": "health"})
            if _receive(stream).get("token") != token:
                return [f"{where} is answered by another process than this node's"]
    except (OSError, ValueError) as error:
        return [f"cannot reach itself at {where}, where the ranks are to meet: {error}"]
    return []


def _accept(listener: socket.socket, token: str, reports: Reports) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection, token, reports), daemon=True).start()


def _serve(connection: socket.socket, token: str, reports: Reports) -> None:
    """Answer one caller. Whatever does not speak as expected (a port scanner, another job) is left alone."""
    try:
        with connection, connection.makefile("rwb") as stream:
            if _receive(stream).get("greeting") != "health":
                return
            _send(stream, {"time": time.time(), "token": token})
            report = _receive(stream)
            if {"node", "faults", "software", "clock_offset", "round_trip"} <= report.keys():
                reports.add(report)
                _send(stream, {"received": True})
    except (OSError, ValueError):
        return


# --- every other node -----------------------------------------------------------------------------------------------


def other_node(me: str, expected: Expected) -> int:
    """Report to the first node and return the exit status: 1 when it could not be reached."""
    deadline = time.monotonic() + expected.timeout
    report = node.report(me, expected)
    error: Exception | None = None
    while time.monotonic() < deadline:
        try:
            with (
                socket.create_connection(
                    (expected.address, expected.port), timeout=deadline - time.monotonic()
                ) as line,
                line.makefile("rwb") as stream,
            ):
                _deliver(stream, report, expected, deadline)
            return 0
        except (OSError, ValueError) as failure:
            error = failure  # the first node may not be listening yet
            time.sleep(RETRY_SECONDS)
    print(f"health check: {me}: cannot reach {expected.address}:{expected.port}: {error}", file=sys.stderr)
    for line_of_mine in report["faults"]:
        print(f"health check: {me}: {line_of_mine}", file=sys.stderr)
    return 1


def _deliver(stream: Any, report: dict[str, Any], expected: Expected, deadline: float) -> None:
    before, sent = time.time(), time.monotonic()
    _send(stream, {"greeting": "health"})
    answer = _receive(stream)
    report["round_trip"] = time.monotonic() - sent
    # the first node read its clock half way, as NTP assumes
    report["clock_offset"] = answer["time"] - (before + report["round_trip"] / 2)
    faults = list(report["faults"])
    shared = expected.directory / f"shared-{answer['token']}"
    if _appears(shared, min(expected.shared_seconds, 0.8 * (deadline - time.monotonic()))):
        try:
            (expected.directory / f"seen-{report['node']}-{answer['token']}").touch()
        except OSError as error:
            faults.append(f"cannot write to {expected.directory}: {error}")
    else:
        faults.append(
            f"{shared}, written by {expected.nodes[0]}, is not visible here: expected a file system that all nodes "
            "share"
        )
    _send(stream, {**report, "faults": faults})
    _receive(stream)


# --- both -----------------------------------------------------------------------------------------------------------


def _appears(path: Path, seconds: float) -> bool:
    """Wait until a file is visible here, and tell whether it is. Listing its folder makes NFS look again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if path.name in os.listdir(path.parent):
                return True
        except OSError:
            pass  # the folder itself may not be visible yet
        if time.monotonic() >= deadline:
            return False
        time.sleep(RETRY_SECONDS)


def _send(stream: Any, message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _receive(stream: Any) -> dict[str, Any]:
    line = stream.readline(LONGEST_LINE)
    if not line.endswith(b"\n"):
        raise ValueError("the other side closed the connection")
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"expected an object, got {message!r}")
    return message


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Check the nodes of a job; one process on each.")
    parser.add_argument("--nodes", required=True, help="names, separated by commas; the first one compares")
    parser.add_argument("--address", required=True, help="where the ranks will meet: the first node")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="a folder that all nodes share")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="expected on every node; 0: none are needed")
    parser.add_argument("--min-gpu-free", type=float, default=0.9, help="fraction of each GPU's memory")
    parser.add_argument("--min-disk-gib", type=float, default=100.0)
    parser.add_argument("--max-clock-skew", type=float, default=5.0, help="seconds")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds")
    parser.add_argument("--imports", default="torch,deepspeed,megatron.core", help="packages, separated by commas")
    values = vars(parser.parse_args(argv))
    values["nodes"] = tuple(values["nodes"].split(","))
    values["imports"] = tuple(filter(None, values["imports"].split(",")))
    expected = Expected(**values)
    index = int(os.environ.get("SLURM_PROCID", "0"))
    if index >= len(expected.nodes):
        parser.error(f"SLURM_PROCID is {index}: expected one process on each of {len(expected.nodes)} nodes")
    # Slurm's own name of the node, by which the job's list and `sbatch --exclude` know it
    me = os.environ.get("SLURMD_NODENAME") or expected.nodes[index]
    return first_node(me, expected) if index == 0 else other_node(me, expected)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads may still serve callers
