"""The one style of all pictures: colours, dashes, marks, and how matplotlib is set up."""

from __future__ import annotations

from typing import Any

from megatron_opus.errors import Refusal

MOST_LINES = 7  # in one picture: more cannot be told apart
# Okabe and Ito's colours, which the common kinds of colour blindness tell apart. Their yellow is left out and their
# orange is darkened, because lines on white need the contrast. The second of each pair is for a dark page.
COLOURS = (
    ("#0072b2", "#5cb8f0"),
    ("#d55e00", "#ff8c42"),
    ("#009e73", "#2fd3a5"),
    ("#b5568f", "#e69ac8"),
    ("#a87400", "#f0b93a"),
    ("#3a3a9e", "#9d9df5"),
    ("#6b6b6b", "#bdbdbd"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # at measured points: told apart without colour, too
BASELINE = "#1b1f24"  # what everything else is compared with: drawn dashed in this colour
UNCLEAR = "#8a929b"  # an interval that does not leave out 0
AXES: Any = {  # a dictionary; matplotlib types every key
    "text.parse_math": False,  # a domain may have a dollar in its name
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.6,
    "path.simplify": True,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 120,
}


class PictureError(Refusal, RuntimeError):
    """A picture that cannot be drawn on this machine."""


def colour(place: int) -> str:
    """Return the colour of the line with this number, counted from 0."""
    return COLOURS[place % len(COLOURS)][0]


def marker(place: int) -> str:
    """Return the mark of the line with this number, counted from 0."""
    return MARKERS[place % len(MARKERS)]


def pyplot() -> Any:
    """Return matplotlib's pyplot in this style, drawing to files only. Raises PictureError without matplotlib."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise PictureError(f"pictures need matplotlib ({error}): pip install -e '.[lab]'") from None
    mpl.rcdefaults()  # whatever the user's own settings are
    mpl.rcParams.update(AXES)
    return pyplot


def log_ticks(axis: Any, low: float, high: float) -> None:
    """Put three to eight labelled ticks at round numbers on a logarithmic axis that shows `low` to `high`.

    matplotlib labels powers of ten alone, of which an axis from 1.0 to 2.3 has one.
    """
    from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator

    subs = (1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)
    locator = LogLocator(subs=subs, numticks=8) if high / low > 10 else MaxNLocator(5)
    ticks = [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([f"{tick:.4g}" for tick in ticks]))
    axis.set_minor_locator(NullLocator())
