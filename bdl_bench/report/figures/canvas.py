"""Figures in one style with fixed margins. Text is never parsed as mathematics, since names may contain $."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

__all__ = [
    "BAD",
    "GUIDE",
    "INK",
    "PAPER",
    "SMALL",
    "SOFT",
    "STYLE",
    "WIDE",
    "Drawing",
    "Margins",
    "blank",
    "diagonal",
    "log_axis",
    "panel",
    "styled",
]

INK, SOFT, GUIDE, BAD, PAPER = "#3b4350", "#9aa3af", "#cfd5dc", "#b0392f", "#ffffff"
SMALL, WIDE = (1.8, 1.65), 3.5
"""Inches: the size of a panel of a grid, and the width of a figure of its own. Text of 8 points is then about 11
pixels high on a screen of 390 pixels, which shows two panels or one figure side by side."""
_STEPS = (1, 2, 2.5, 5, 10)
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GUIDE,
    "axes.labelcolor": INK,
    "axes.labelpad": 2.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "bdl-bench",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # TrueType: journals reject the Type 3 fonts that are the default
    "ps.fonttype": 42,
}


@dataclass(frozen=True)
class Margins:
    """Distances between axes and figure, in inches."""

    left: float = 0.5
    right: float = 0.13
    bottom: float = 0.38
    top: float = 0.08


@dataclass(frozen=True)
class Drawing:
    """A figure with a file name, a caption, and a description in words."""

    name: str
    title: str
    description: str
    figure: Figure

    @classmethod
    def of(cls, axes: Axes, name: str, title: str, description: str) -> Drawing:
        """Return the figure of these axes."""
        figure = axes.get_figure(root=True)
        assert figure is not None
        return cls(name, title, description, figure)


@contextmanager
def panel(
    x_label: str, y_label: str, *, size: tuple[float, float] = SMALL, margins: Margins = Margins()
) -> Iterator[Axes]:
    """Yield one pair of axes; `size` is in inches."""
    with blank(size) as figure:
        width, height = size
        axes = figure.add_axes(
            (
                margins.left / width,
                margins.bottom / height,
                1 - (margins.left + margins.right) / width,
                1 - (margins.bottom + margins.top) / height,
            )
        )
        axes.patch.set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4 if min(size) < 2 else 6, steps=_STEPS))
        yield axes
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)


def styled() -> AbstractContextManager[None]:
    """Return a context with the common style. If nested it does nothing, since copying all settings is slow."""
    return nullcontext() if rcParams["svg.hashsalt"] == STYLE["svg.hashsalt"] else rc_context(STYLE)


@contextmanager
def blank(size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure without axes in the common style."""
    with styled():
        yield Figure(figsize=size, frameon=False)


def diagonal(axes: Axes, low: float, high: float) -> None:
    """Draw the line on which both axes are equal."""
    axes.plot([low, high], [low, high], color=GUIDE, lw=1.0, zorder=0)


def log_axis(axes: Axes, which: str, low: float, high: float, *, most: float = 100, ticks: int = 6) -> None:
    """Set a logarithmic axis with plain numbers; 1, 3 or 1, 2, 5 per decade if high/low is less than `most`."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    ratio = high / low
    axis.set_major_locator(
        LogLocator(
            subs=(1, 2, 5) if ratio < most / 3 else (1, 3) if ratio < most else (1,),
            numticks=ticks if ratio < 1e6 else ticks - 1,
        )
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())
