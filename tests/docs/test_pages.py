"""The pages: every relative link and anchor resolves, the front page is short, and the code on a page runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_opus.types import Candidates, Signals

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
CODE = re.compile(r"^(```|~~~).*?^\1|^ {4}.*?$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def pages_of(root: Path) -> list[Path]:
    """All Markdown pages that are part of the project, those of the evidence's raw tables included."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return [root / name for name in listed.stdout.splitlines() if (root / name).is_file()]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings: lower case, punctuation dropped, blanks to hyphens."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6}\s+(.*?)\s*$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(name if name not in found else f"{name}-{found[name]}")
        found[name] = found.get(name, 0) + 1
    return names


def broken_links(pages: list[Path]) -> list[str]:
    faults = []
    for page in pages:
        for _, target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                faults.append(f"{page}: {target}: no such file")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                faults.append(f"{page}: {target}: no such heading")
    return faults


def test_every_link_of_every_page_resolves() -> None:
    """Guards against a page that was moved or a heading that was renamed while links still name the old one."""
    pages = pages_of(ROOT)
    assert ROOT / "README.md" in pages
    faults = broken_links(pages)
    assert not faults, "\n".join(faults)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """Guards against a check of links that looks at nothing, or that takes code for links."""
    page, other = tmp_path / "a.md", tmp_path / "b.md"
    other.write_text("# What `x` costs, and why\n\n## Twice\n\n## Twice\n")
    page.write_text(
        "[good](b.md#what-x-costs-and-why) [good](b.md#twice-1) [web](https://example.org) `[code](none.md)`\n\n"
        "    [code](none.md)\n\n[bad](c.md) ![bad](d.png) [bad](b.md#thrice)\n"
    )
    assert [fault.split(": ", 1)[1] for fault in broken_links([page, other])] == [
        "c.md: no such file",
        "d.png: no such file",
        "b.md#thrice: no such heading",
    ]


def test_every_page_of_the_documentation_is_in_its_index() -> None:
    """Guards against a page that nobody finds."""
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == {target for _, target in LINK.findall(index)} & pages


def test_the_readme_stays_a_front_page() -> None:
    """Guards against a README that grows into a manual again: readers give it ten minutes."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 110 <= len(lines) <= 160
    assert max(len(line) for line in lines if not line.startswith("|")) <= 125


@pytest.fixture(scope="module")
def strategy():
    """The class that docs/add-a-strategy.md writes, made from the page itself."""
    page = (ROOT / "docs/add-a-strategy.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(compile("from __future__ import annotations\n" + code, "docs/add-a-strategy.md", "exec"), names)
    return names["BestOfEachDomain"]()


def choose(strategy, alignment: list[float], domains: list[int], k: int, seed: int = 0):
    candidates = Candidates(step=0, sample_ids=np.arange(len(domains)), domains=np.array(domains, dtype=np.int32))
    signals = Signals(alignment=torch.tensor(alignment, dtype=torch.float64))
    return strategy.select(candidates, signals, k, torch.Generator().manual_seed(seed))


def test_the_strategy_of_the_page_does_what_the_page_says(strategy) -> None:
    """Guards against a worked example that no longer runs, or whose own table is wrong."""
    assert choose(strategy, [5, 4, 3, 2, 1], [0, 0, 0, 1, 1], 3).indices.tolist() == [0, 3, 1]
    assert strategy.needs == {"ghost"}


def test_the_strategy_of_the_page_never_takes_a_score_that_is_not_finite(strategy) -> None:
    """Guards against teaching readers a NaN that sorts first, or a fallback that nobody sees."""
    nan, inf = float("nan"), float("inf")
    chosen = choose(strategy, [nan, 1, inf, 2, 3], [0, 0, 1, 1, 1], 3)
    assert chosen.indices.tolist() == [4, 1, 3]
    assert chosen.fallback == ""
    assert "1 of 3 candidates have a finite score" in choose(strategy, [nan, 1, nan], [0, 0, 0], 2).fallback
