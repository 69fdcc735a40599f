"""The health check: processes that stand for nodes, each with a fault of its own, and what the first one says."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_opus.cluster import health, node

NODES = ("localhost", "n2", "n3")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def check(
    folder: Path, port: int | None = None, different: dict[int, dict[str, Any]] | None = None, **options: Any
) -> tuple[list[int], list[str], dict[str, Any]]:
    """The check on NODES: statuses, what the first node printed, and the record. `different`: index of a node -> other
    options, or a folder that its Python searches first ("packages")."""
    port = port or free_port()
    folder.mkdir(exist_ok=True)
    processes = []
    for index in range(len(NODES)):
        values = {
            **{"nodes": ",".join(NODES), "address": "localhost", "port": port, "directory": folder / "job.0"},
            **{"output_dir": folder, "gpus": 0, "min_disk_gib": 0, "timeout": 60, "imports": "yaml"},
            **options,
            **(different or {}).get(index, {}),
        }
        packages = values.pop("packages", None)
        words = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        # forked: torch, which every node imports, is there already
        process = multiprocessing.get_context("fork").Process(
            target=one_node, args=(index, words, folder / f"{index}.log", packages)
        )
        process.start()
        processes.append(process)
    for process in processes:
        process.join(300)
    record = json.loads((folder / "job.0/health.json").read_text())["nodes"]
    return [process.exitcode or 0 for process in processes], (folder / "0.log").read_text().splitlines(), record


def one_node(index: int, words: list[str], log: Path, packages: Path | None) -> None:
    with log.open("w", buffering=1) as sys.stderr:
        os.environ.update(SLURM_PROCID=str(index), SLURMD_NODENAME=NODES[index])
        if packages is not None:
            sys.path.insert(0, str(packages))
        status = health.main(words)
    os._exit(status)


def test_every_fault_is_said_of_its_own_node(tmp_path: Path) -> None:
    """Guards against a check that passes, blames the wrong node or stops at the first fault."""
    packages = tmp_path / "packages"
    (packages / "numpy-0.0.1.dist-info").mkdir(parents=True)
    (packages / "numpy-0.0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    different = {1: {"min_disk_gib": 1e9}, 2: {"packages": packages}}
    statuses, said, record = check(tmp_path / "run", different=different)
    assert statuses == [1, 0, 0]
    assert len(said) == 3, said
    assert said[0].startswith("health check: n2: ")
    assert "GiB free, expected 1e+09 (MIN_DISK_GIB)" in said[0]
    assert said[1].startswith("health check: n3: numpy is 0.0.1, other nodes have ")
    assert said[2].startswith("health check: 1 of 3 nodes are fit")
    assert (tmp_path / "run/job.0/bad_nodes").read_text() == "n2,n3\n"
    assert record["localhost"]["faults"] == []
    assert record["localhost"]["software"]["torch"] == record["n3"]["software"]["torch"]


def test_a_folder_that_is_not_shared_and_a_port_that_is_not_reached(tmp_path: Path) -> None:
    """Guards against checkpoints on a node's own disk, and against ranks that wait half an hour for a closed port."""
    apart = {"directory": tmp_path / "elsewhere"}
    different = {1: apart, 2: {"address": "127.0.0.1", "port": free_port(), "timeout": 2}}
    statuses, said, record = check(tmp_path / "run", different=different, timeout=10)
    assert statuses == [1, 0, 1]
    assert "n2: " in said[0]
    assert "written by localhost, is not visible here: expected a file system that all nodes share" in said[0]
    assert "n3: no report within 10 s" in said[1]
    assert record["n3"] == {"faults": [said[1].removeprefix("health check: n3: ")]}


def test_three_fit_nodes_pass(tmp_path: Path) -> None:
    """Guards against a check that finds faults everywhere, and leaves a list of bad nodes behind."""
    statuses, said, record = check(tmp_path / "run", imports="torch")
    assert statuses == [0, 0, 0]
    assert len(said) == 1
    assert said[0].startswith("health check: 3 of 3 nodes are fit")
    assert not (tmp_path / "run/job.0/bad_nodes").exists()
    assert {name: facts["faults"] for name, facts in record.items()} == {name: [] for name in NODES}
    assert all(abs(facts["clock_offset"]) < 1 for facts in record.values())


def test_a_port_in_use_is_the_first_node_s_fault_alone(tmp_path: Path) -> None:
    """Guards against excluding every node of the job because another process listens where ranks are to meet."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with_port = health.Expected(
            **{"nodes": NODES, "address": "localhost", "port": port, "directory": tmp_path, "output_dir": tmp_path},
            **{"gpus": 0, "min_gpu_free": 0.9, "min_disk_gib": 0, "max_clock_skew": 5, "timeout": 1, "imports": ()},
        )
        assert health.first_node("localhost", with_port) == 1
    faults = json.loads((tmp_path / "health.json").read_text())["nodes"]
    assert f"cannot listen at port {port}" in faults["localhost"]["faults"][0]
    assert (tmp_path / "bad_nodes").read_text() == "localhost\n"


def expected(tmp_path: Path) -> health.Expected:
    return health.Expected(
        **{"nodes": NODES, "address": "localhost", "port": 1, "directory": tmp_path, "output_dir": tmp_path},
        **{"gpus": 0, "min_gpu_free": 0.9, "min_disk_gib": 0, "max_clock_skew": 5, "timeout": 1, "imports": ()},
    )


def report(**values: Any) -> dict[str, Any]:
    return {"faults": [], "software": {"torch": "2"}, "clock_offset": 0.0, "round_trip": 0.01, **values}


@pytest.mark.parametrize(
    ("n2", "n3", "words"),
    [
        (report(clock_offset=7.0), report(), {"n2": "its clock is 7.0 s behind that of localhost"}),
        (report(clock_offset=-7.0), report(), {"n2": "its clock is 7.0 s ahead of that of localhost"}),
        (report(clock_offset=7.0, round_trip=5.0), report(), {}),  # a slow network, not a wrong clock
        (report(software={"torch": "3"}), report(software={"torch": "3"}), {"localhost": "torch is 2, other nodes"}),
        (report(software={}, faults=["broken"]), report(), {"n2": "broken"}),  # nothing to compare
    ],
)
def test_nodes_are_compared(tmp_path: Path, n2: dict[str, Any], n3: dict[str, Any], words: dict[str, str]) -> None:
    """Guards against wrong clocks and versions passing, and against a majority that is called different."""
    found = health.judge({"localhost": report(), "n2": n2, "n3": n3}, expected(tmp_path))
    assert {name for name, lines in found.items() if lines} == set(words)
    for name, text in words.items():
        assert len(found[name]) == 1
        assert found[name][0].startswith(text)


def test_strangers_on_the_port_are_left_alone() -> None:
    """Guards against a port scanner, or a rank of another job, that ends the check or counts as a node."""
    reports = health.Reports()
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"greeting": "health"}\n{"node": "n9"}\n', b""):
        ours, theirs = socket.socketpair()
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        health._serve(ours, "token", reports)
        theirs.close()
    assert reports.by_node == {}


# --- one node -------------------------------------------------------------------------------------------------------


def test_missing_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a node whose fourth GPU has fallen off the bus, and whose ranks would die one by one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts, faults = node.gpu_faults(4, 0.9)
    assert facts == []
    assert faults == ["expected 4 GPUs, found 0 (CUDA_VISIBLE_DEVICES: )"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a full day of training whose first checkpoint finds a disk mounted read-only."""
    monkeypatch.setattr(node.os, "access", lambda path, mode: False)  # root may write everywhere
    free, faults = node.disk_faults(tmp_path / "not/made/yet", 0)
    assert free > 0
    assert faults == [f"{tmp_path}: cannot be written to, and output_dir is {tmp_path / 'not/made/yet'}"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "echo '0, Not Active, 1980 MHz, 1980 MHz'; echo '1, Active, 345 MHz, 1980 MHz'",
            ["GPU 1: the hardware holds its clock down (345 MHz of 1980 MHz)"],
        ),
        ("echo '0, [N/A], [N/A], [N/A]'", []),
        ("echo 'Failed to initialize NVML' >&2; exit 9", ["nvidia-smi failed: "]),
        (None, []),
    ],
)
def test_held_down_clocks_are_said(tmp_path: Path, body: str | None, expected: list[str]) -> None:
    """Guards against one hot GPU at a fifth of its speed, which all other ranks wait for at every step."""
    if body is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
    found = node.slowed_down(str(tmp_path))
    assert len(found) == len(expected)
    assert all(a.startswith(b) for a, b in zip(found, expected, strict=True))
