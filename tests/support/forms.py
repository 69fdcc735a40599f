"""The short form of a test with many cases: those that it leaves out run in the whole form, `tests/run.sh --whole`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def mostly_whole(cases: Iterable[Any], short: Callable[..., bool]) -> list[Any]:
    """The parameters of a test: those for which `short(*case)` holds run always, the others in the whole form."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=[] if short(*values) else [pytest.mark.whole]))
    return found
