"""Bytes and values of every kind in the files that are read: only the project's own errors come out."""

from __future__ import annotations

import contextlib
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_opus.backends.formats import indexed
from megatron_opus.config import from_dict, load
from megatron_opus.config.recipe import RunConfig
from megatron_opus.config.schema import keys_of
from megatron_opus.data import manifest as manifests
from megatron_opus.errors import Refusal
from megatron_opus.runs import checkpoints
from megatron_opus.runs.ledger import read_ledger
from megatron_opus.runs.lock import RunLock
from megatron_opus.runs.metrics import read_metrics
from megatron_opus.runs.record import compare_record

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([10**30, -1, 0, 1e308, "../x", "\0", "~", "1e-4", "NaN"])
)
ANY = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
KEYS = keys_of(RunConfig)
SMALL: dict[str, Any] = {"name": "x", "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}}


def changed(content: bytes, edits: list[tuple[float, int]], cut: float) -> bytes:
    """Bytes at relative places replaced by others, and the end cut off."""
    data = bytearray(content)
    for place, byte in edits:
        data[int(place * len(data)) % len(data)] = byte
    return bytes(data[: max(0, round(cut * len(data)))])


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)
CUT = st.sampled_from([1.0, 1.0, 1.0, 0.99, 0.5, 0.01, 0.0])


@FUZZ
@given(key=st.sampled_from(KEYS), value=ANY)
def test_recipes(key: str, value: Any) -> None:
    """Guards against a traceback for a value of another kind anywhere in a recipe."""
    raw: dict[str, Any] = {**SMALL, "model": dict(SMALL["model"])}
    node = raw
    *sections, last = key.split(".")
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    with contextlib.suppress(Refusal):
        from_dict(raw)


@FUZZ
@given(content=st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode))
def test_recipe_files(tmp_path: Path, content: bytes) -> None:
    """Guards against a traceback for a recipe that is no YAML, no text, or no recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with contextlib.suppress(Refusal):
        load(path)
    path.write_bytes(yaml.safe_dump(SMALL).encode() + content)
    with contextlib.suppress(Refusal):
        load(path)


@FUZZ
@given(key=st.sampled_from([*KEYS, "model", "x.y", "", "."]), value=st.text(max_size=12))
def test_overrides(tmp_path: Path, key: str, value: str) -> None:
    """Guards against a traceback for anything that is typed after a key."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with contextlib.suppress(Refusal):
        load(path, [f"{key}={value}"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    lengths = np.array([5, 3, 7], dtype=np.int32)
    np.arange(15, dtype=np.uint16).tofile(folder / "raw")
    indexed.write_documents(folder / "d", np.dtype(np.uint16), [folder / "raw"], [lengths])
    return folder


@FUZZ
@given(edits=EDITS, cut=CUT)
def test_indexes(prepared: Path, tmp_path: Path, edits: list[tuple[float, int]], cut: float) -> None:
    """Guards against a traceback, or gigabytes asked for, by an index that is torn or of another kind."""
    (tmp_path / "d.bin").write_bytes((prepared / "d.bin").read_bytes())
    (tmp_path / "d.idx").write_bytes(changed((prepared / "d.idx").read_bytes(), edits, cut))
    with contextlib.suppress(Refusal):
        documents = indexed.open_documents("d", tmp_path / "d")
        assert documents.document_ends[-1] == documents.num_tokens == 15
        documents.tokens(0, documents.num_tokens)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a run: a part of a ledger, metrics, a marker."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from megatron_opus.runs.ledger import SCHEMA

    run = tmp_path_factory.mktemp("run")
    (run / "ledger").mkdir()
    values = {"step": [0, 0], "sample_id": [1, 2], "selected": [True, False], "draw_order": [0, -1]}
    columns = [
        pa.array(values[field.name], field.type) if field.name in values else pa.nulls(2, field.type)
        for field in SCHEMA
    ]
    pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), run / "ledger/steps-00000000-00000000.parquet")
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.5}\n{"step": 1, "loss": null}\n')
    return run


@FUZZ
@given(edits=EDITS, cut=CUT)
def test_ledgers(recorded: Path, tmp_path: Path, edits: list[tuple[float, int]], cut: float) -> None:
    """Guards against a traceback of Arrow's for a part that is torn or changed."""
    (tmp_path / "ledger").mkdir(exist_ok=True)
    name = "ledger/steps-00000000-00000000.parquet"
    (tmp_path / name).write_bytes(changed((recorded / name).read_bytes(), edits, cut))
    with contextlib.suppress(Refusal):
        read_ledger(tmp_path / "ledger")
    with contextlib.suppress(Refusal):
        compare_record(tmp_path)


@FUZZ
@given(edits=EDITS, cut=CUT, row=ANY)
def test_metrics(recorded: Path, tmp_path: Path, edits: list[tuple[float, int]], cut: float, row: Any) -> None:
    """Guards against a traceback for rows that are torn, of another kind, or not UTF-8."""
    content = changed((recorded / "metrics.jsonl").read_bytes(), edits, cut)
    (tmp_path / "metrics.jsonl").write_bytes(content + json.dumps(row).encode() + b"\n")
    with contextlib.suppress(Refusal):
        read_metrics(tmp_path)
    with contextlib.suppress(Refusal):
        compare_record(tmp_path)


MARKER_KEYS = ("format", "step", "layout", "config", "fingerprints", "versions", "files", "sha256")


@FUZZ
@given(key=st.sampled_from(("", *MARKER_KEYS)), value=ANY)
def test_markers_of_checkpoints(tmp_path: Path, key: str, value: Any) -> None:
    """Guards against a traceback for a complete.json that was edited or torn."""
    path = tmp_path / "step_00000001"
    path.mkdir(exist_ok=True)
    config = from_dict(SMALL)
    whole = {
        **{"format": checkpoints.FORMAT, "step": 1, "layout": {}, "config": {}, "fingerprints": {}, "versions": {}},
        **{"files": {}, "sha256": {}},
    }
    (path / checkpoints.MARKER).write_text(json.dumps(value if not key else whole | {key: value}))
    with contextlib.suppress(Refusal):
        marker = checkpoints.read_marker(path)
        checkpoints.verify_contents(path, marker)
    with contextlib.suppress(Refusal):
        checkpoints.check(path, layout={}, fingerprints={}, config=config)


@FUZZ
@given(value=ANY, key=st.sampled_from(["", "pid", "started", "host", "job", "since"]))
def test_locks(tmp_path: Path, value: Any, key: str) -> None:
    """Guards against a run that cannot start for a lock that somebody has edited."""
    lock = RunLock(tmp_path)
    with contextlib.suppress(Refusal):
        lock.acquire()
        path = tmp_path / "lock"
        held = json.loads(path.read_text())
        path.write_text(json.dumps(held | {key: value} if key else value))
    with contextlib.suppress(Refusal):
        RunLock(tmp_path).acquire()
    (tmp_path / "lock").unlink(missing_ok=True)


@FUZZ
@given(content=st.binary(max_size=80))
def test_manifests_as_bytes(tmp_path: Path, content: bytes) -> None:
    """Guards against a traceback for a manifest that is no JSON. Malformed values: tests/data/test_manifest_fuzz.py."""
    (tmp_path / manifests.FILE_NAME).write_bytes(content)
    with contextlib.suppress(Refusal):
        manifests.read(tmp_path)
