"""Manifests of every malformed shape: only our own error comes out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_opus.data import manifest as manifests
from megatron_opus.data.manifest import DatasetEntry, Manifest, ManifestError

ENTRY = DatasetEntry(
    name="a", role="candidates", prefix="candidates/a", dtype="uint16", documents=1, tokens=2, bin_bytes=4,
    bin_sha256="0", idx_sha256="1", sources=[],
)  # fmt: skip
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANY = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
KEYS = sorted(manifests.entry_dict(ENTRY))


def whole() -> dict[str, Any]:
    base = Manifest(tokenizer={"fingerprint": "f"}, datasets=[ENTRY], settings={})
    return {
        "format": manifests.FORMAT,
        "version": manifests.VERSION,
        **vars(base),
        "datasets": [manifests.entry_dict(ENTRY)],
    }


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(["", *whole(), *(f"datasets.{key}" for key in KEYS)]), value=ANY)
def test_only_our_error_comes_out(tmp_path: Path, where: str, value: Any) -> None:
    """Guards against a traceback, or a number where a path is wanted, from a manifest that was edited or torn."""
    data = whole()
    top, _, key = where.partition(".")
    if key:
        data["datasets"][0][key] = value
    elif top:
        data[top] = value
    text = json.dumps(data if where else value)
    (tmp_path / manifests.FILE_NAME).write_text(text)
    with contextlib.suppress(ManifestError):
        manifests.read(tmp_path).fingerprint()


@pytest.mark.parametrize(
    ("key", "value"),
    [("prefix", "../x"), ("prefix", "/etc/x"), ("role", "test"), ("tokens", -1), ("tokens", 1 << 70), ("tokens", True),
     ("sources", {}), ("bin_sha256", None)],
)  # fmt: skip
def test_the_key_is_named(tmp_path: Path, key: str, value: Any) -> None:
    """Guards against files read from outside of the directory, and against counts that are none."""
    data = whole()
    data["datasets"][0][key] = value
    (tmp_path / manifests.FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=f"datasets: {key}: expected"):
        manifests.read(tmp_path)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b""])
def test_bytes_that_are_no_json(tmp_path: Path, content: bytes) -> None:
    """Guards against UnicodeDecodeError and RecursionError."""
    (tmp_path / manifests.FILE_NAME).write_bytes(content)
    with pytest.raises(ManifestError, match="valid JSON"):
        manifests.read(tmp_path)
