"""docs/config.md against the fields it tells of."""

from __future__ import annotations

import config_page

from megatron_opus.config import RunConfig
from megatron_opus.config.schema import keys_of


def test_the_page_is_that_of_the_source() -> None:
    """Guards against a page with keys, defaults, ranges or sentences of an older version."""
    assert config_page.PAGE.read_text(encoding="utf-8") == config_page.page(), "python tests/support/config_page.py"


def test_every_key_has_its_sentence() -> None:
    """Guards against a key that nobody explains: each row ends with a sentence, and there is a row for each key."""
    rows = [line for line in config_page.page().splitlines() if line.startswith("| `")]
    sections = [line for line in config_page.page().splitlines() if line.startswith("## ")]
    assert len(rows) + len(sections) == len(keys_of(RunConfig))
    for row in rows:
        assert row.endswith((". |", "). |")), row
        assert len(row.split(" | ")[-1].split()) > 1, row
