"""docs/evidence.md against the results it reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EVIDENCE = ROOT / "docs/evidence"
FOLDERS = sorted(path.parent for path in EVIDENCE.glob("*/report.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_are_the_reports(folder):
    """Fault: a table edited by hand, or one of an older run beside new figures."""
    text = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    for table in (folder / "report.md").read_text(encoding="utf-8").strip().split("\n\n"):
        assert table in text
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    for arm in data["arms"]:
        assert any(row.startswith(f"| {arm['arm']} |") and f"{arm['loss']['mean']:.4f}" in row for row in rows)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_was_announced_is_what_the_protocol_says(folder):
    """Fault: a protocol whose hypothesis, metric or arms were changed after its results were written down."""
    from megatron_opus.training.lab import read_experiment

    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found = read_experiment(ROOT / "configs/lab" / f"{folder.name.removesuffix('_shared')}.yaml")
    if folder.name.endswith("_shared"):
        found = found.on_shared_text()
    assert (data["hypothesis"], data["stopping_rule"]) == (found.hypothesis, found.stopping_rule)
    assert (data["metric"], data["baseline"]) == ([*found.metric], found.baseline)
    assert [arm["arm"] for arm in data["arms"]] == [*found.arms]
    assert {run["seed"] for run in data["runs"]} <= {*found.seeds}


def test_every_picture_is_shown_and_is_there():
    """Fault: a link to a picture that is not in the repository, or one that no page shows."""
    pages = [ROOT / "docs" / name for name in ("evidence.md", "performance.md")]
    shown = {
        (page.parent / link).resolve()
        for page in pages
        for link in re.findall(r"\]\((evidence/[^)]+)\)", page.read_text(encoding="utf-8"))
    }
    assert all(path.is_file() for path in shown)
    assert {path.resolve() for path in EVIDENCE.glob("*/*.png")} <= shown
