"""Panels as inline SVG: one set of axes each, so that a page can lay them out for its width.

matplotlib draws; what it writes is then made fit to stand inside of a page: no namespaces or references to anywhere,
ids of its own for each panel, the page's colours (variables that change between light and dark), and a `<title>` for
what was named with `tip`, which browsers show when the pointer rests on it. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from megatron_opus.report.record import ReportError
from megatron_opus.style import AXES, COLOURS, colour, marker

try:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:  # pragma: no cover - the extra is installed where the tests run
    raise ReportError(f"the report's pictures need matplotlib ({error}): pip install -e '.[lab]'") from None

# colours that stand for the page's own: (as matplotlib gets them, the page's variable)
INK, GRID, MUTED = "#010203", "#010204", "#010205"
PAGE = ((INK, "var(--ink)"), (GRID, "var(--grid)"), (MUTED, "var(--muted)"))
WIDTH, HEIGHT = 4.6, 2.75  # inches of 72 points
SETTINGS: dict[str, Any] = {
    **AXES,
    "svg.fonttype": "none",  # text stays text
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


class Panel:
    """One picture in the making. x and y may hold NaN: lines are broken there."""

    def __init__(self, title: str, x_label: str, y_label: str) -> None:
        self.title, self.x_label, self.y_label = title, x_label, y_label
        self._draw: list[Callable[[Any], None]] = []
        self._tips: list[str] = []
        self.runs: set[int] = set()  # that have a line here
        self.zero = False  # whether the y axis shall begin at 0
        self.top: float | None = None

    @property
    def empty(self) -> bool:
        return not self._draw

    def line(self, run: int, x: Any, y: Any, *, tip: str = "", style: Any = None, **how: Any) -> None:
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        gid = self._tip(tip)
        self.runs.add(run)
        how = {"color": colour(run), "linewidth": 1.5, "linestyle": style or "-", **how}
        self._draw.append(lambda axes: axes.plot(x, y, gid=gid, **how))

    def points(self, run: int, x: Sequence[float], y: Sequence[float], tips: Sequence[str]) -> None:
        """Small marks in the run's shape, each of which says what it is."""
        for x0, y0, tip in zip(x, y, tips, strict=True):
            if math.isfinite(x0) and math.isfinite(y0):
                gid = self._tip(tip)
                self._draw.append(_dot(x0, y0, run, gid))

    def band(self, run: int, x: Any, low: Any, high: Any, *, of: str | None = None, opacity: float = 0.22) -> None:
        face = colour(run) if of is None else of
        self._draw.append(lambda axes: axes.fill_between(x, low, high, color=face, alpha=opacity, linewidth=0))

    def draw(self, action: Callable[[Any], None]) -> None:
        """Anything else that matplotlib's axes can do."""
        self._draw.append(action)

    def svg(self, key: str) -> str:
        """Markup of the panel. `key` must be unlike that of any other panel of the page."""
        with mpl.rc_context():
            mpl.rcdefaults()  # whatever the user's own settings are
            settings: Any = {**SETTINGS, "svg.hashsalt": key}
            mpl.rcParams.update(settings)
            figure = Figure(figsize=(WIDTH, HEIGHT))
            FigureCanvasSVG(figure)
            axes = figure.add_axes((0.165, 0.165, 0.815, 0.72))
            for action in self._draw:
                action(axes)
            axes.set_title(_short(self.title), loc="left", fontsize=10, fontweight="bold", pad=7)
            axes.set_xlabel(self.x_label, labelpad=3)
            axes.set_ylabel(self.y_label, labelpad=3)
            axes.margins(x=0.02)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
                axis.set_major_formatter(FuncFormatter(_tick_label(axis)))
                axis.set_tick_params(length=3, width=0.6)
            if self.zero:
                axes.set_ylim(bottom=0)
            if self.top is not None:
                axes.set_ylim(top=self.top)
            out = io.StringIO()
            none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(out, format="svg", transparent=True, metadata=none)
        return _inline(out.getvalue(), key, f"{self.title}: {self.y_label} against {self.x_label}", self._tips)

    def _tip(self, text: str) -> str | None:
        if not text:
            return None
        self._tips.append(text)
        return f"tip{len(self._tips) - 1}"


def _short(title: str, most: int = 44) -> str:
    """The beginning and the end of what is too long for a panel."""
    return title if len(title) <= most else f"{title[: most // 2 - 1]}…{title[-most // 2 :]}"


def _dot(x: float, y: float, run: int, gid: str | None) -> Callable[[Any], None]:
    how = {"marker": marker(run), "markersize": 3.8, "color": colour(run), "linestyle": "none"}
    return lambda axes: axes.plot([x], [y], gid=gid, **how)


def _tick_label(axis: Any) -> Callable[[float, Any], str]:
    """Labels with as many digits as the distance between ticks asks for."""

    def label(value: float, _: Any) -> str:
        low, high = sorted(axis.get_view_interval())
        return number(value, (high - low) / 5, max(abs(low), abs(high)))

    return label


def number(value: float, resolution: float, size: float = 0.0) -> str:
    """`value` in a few characters, exact to a tenth of `resolution` or better: 1.5k, 20M, 0.035, 2e-5.

    size: the largest of the numbers that stand together, so that all of them get one notation.
    """
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or abs(value) < resolution * 1e-6:
        return "0"
    size = max(abs(value), resolution, size)
    if size < 1e-3:
        digits = max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(resolution)) + 1)
        mantissa, _, exponent = f"{value:.{min(digits, 6)}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= (factor if factor > 1e3 else 1e4):
            return f"{_fixed(value / factor, resolution / factor)}{suffix}"
    return _fixed(value, resolution)


def _fixed(value: float, resolution: float) -> str:
    digits = min(6, max(0, 1 - math.floor(math.log10(resolution)))) if resolution > 0 else 2
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _inline(svg: str, key: str, label: str, tips: Sequence[str]) -> str:
    """matplotlib's file as an element of a page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'<svg ([^>]*)viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\2" role="img">', body, count=1)
    body = re.sub(r"<style.*?</style>\s*", "", body, flags=re.DOTALL)  # it would hold for the whole page
    for i, tip in enumerate(tips):
        body = body.replace(f'<g id="tip{i}">', f"<g><title>{escape(tip)}</title>", 1)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([^")]*)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#', rf"\g<1>#{key}-", body)
    body = re.sub(r"font: (?:(bold|\d+) )?([\d.]+)px [^;\"]*", _font, body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)  # the page's own
    body = re.sub(r"\n\s*", "\n", body)
    for index, (light, _) in enumerate(COLOURS):
        body = body.replace(light, f"var(--run{index})")
    for sentinel, variable in PAGE:
        body = body.replace(sentinel, variable)
    return body.replace('role="img">', f'role="img" aria-label="{escape(label)}">', 1).strip()


def _font(match: re.Match[str]) -> str:
    weight = f"; font-weight: {match[1]}" if match[1] else ""
    return f"font-size: {match[2]}px{weight}"
