"""Panels: what stands at an axis, smoothing, and markup that fits into a page."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the report needs the extra `lab`")

from matplotlib.ticker import MaxNLocator

from megatron_opus.report.panels import binned
from megatron_opus.report.pictures import Panel, number

SUFFIX = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def read(label: str) -> float:
    return float(label[:-1]) * SUFFIX[label[-1]] if label[-1] in SUFFIX else float(label)


@pytest.mark.parametrize("scale", [10.0**e for e in range(-9, 14)])
@pytest.mark.parametrize("low", [0.0, -0.3, 0.9, 5.0])
def test_labels_of_ticks_are_their_values(scale: float, low: float) -> None:
    """Guards against 2.5e-4 that is shown as 3e-4, two ticks with one label, and labels that do not fit."""
    low, high = low * scale, (low + 0.8) * scale
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3).tick_values(low, high)
    labels = [number(float(tick), (high - low) / 5, max(abs(low), abs(high))) for tick in ticks]
    step = ticks[1] - ticks[0]
    for tick, label in zip(ticks, labels, strict=True):
        assert abs(read(label) - tick) < 0.02 * step, (tick, label)
        assert len(label) <= 8, label
    assert len(set(labels)) == len(labels)


def test_bins_hold_every_step_once() -> None:
    """Guards against an end of the run that falls off the picture."""
    step = np.arange(10, 1013)
    x, y = binned(step, step.astype(float), 100)
    assert len(x) == 100
    np.testing.assert_allclose(x, y)
    counts = np.bincount(np.arange(1003) * 100 // 1003)
    assert (x * counts).sum() == pytest.approx(step.sum())
    values = np.where(step < 500, np.nan, 1.0)
    assert np.isnan(binned(step, values, 100)[1][0])


def test_markup_stands_inside_of_a_page() -> None:
    """Guards against styles, ids and titles of one panel that reach into the rest of the page."""
    panel = Panel('</svg><script>x</script> "quoted" $dollar$', "step", "loss <b>")
    panel.line(0, [0, 1, 2], [1.0, np.nan, 3.0], tip="a <i>tip</i>")
    panel.points(1, [0, 1], [1.0, np.nan], ["one & only", "never drawn"])
    panel.band(0, np.array([0, 1]), np.array([0.0, 0.0]), np.array([1.0, 1.0]))
    first, second = panel.svg("p1"), panel.svg("p2")
    assert first == panel.svg("p1")
    assert first.replace("p1-", "p2-").count("p2-") == second.count("p2-")
    for forbidden in ("<script", "<style", "xmlns", "http", "<b>", "<i>", "<?xml", "DejaVu", "#0072b2"):
        assert forbidden not in first, forbidden
    assert "<title>a &lt;i&gt;tip&lt;/i&gt;</title>" in first
    assert "one &amp; only" in first
    assert "never drawn" not in first
    assert "$dollar$" in first
    assert "var(--run0)" in first
    assert first.startswith("<svg ")
    assert first.endswith("</svg>")
