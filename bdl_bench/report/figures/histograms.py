"""Histograms of out-of-distribution scores, one row of the figure per method."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bdl_bench.report.figures.canvas import INK, SOFT, Drawing, blank
from bdl_bench.report.figures.labels import short
from bdl_bench.report.palette import Palette

__all__ = ["histograms"]

Floats = NDArray[np.float64]
_ROW, _NAMES, _WIDTH, _BINS = 0.3, 1.4, 4.1, 24


def histograms(
    name: str, title: str, scores: Mapping[str, tuple[Floats, Floats]], palette: Palette, *, note: Mapping[str, str]
) -> Drawing:
    """Draw the histograms of the ranks of (test, other) scores among both, test rows in grey, with `note` at the right.

    Ranks are shown since scores of different methods have different units, and AUROC depends on ranks alone.
    """
    rows = len(scores)
    height = _ROW * rows + 0.7
    with blank((_WIDTH, height)) as figure:
        axes = figure.add_axes((_NAMES / _WIDTH, 0.38 / height, 1 - (_NAMES + 0.62) / _WIDTH, 1 - 0.62 / height))
        edges = np.linspace(0, 1, _BINS + 1)
        for row, (method, (inside, outside)) in enumerate(scores.items()):
            base = float(rows - 1 - row)
            for values, colour, alpha in zip(
                _densities(inside, outside), (SOFT, palette[method].colour), (0.55, 0.6), strict=True
            ):
                axes.stairs(
                    base + 0.85 * values, baseline=base, edges=edges, fill=True, color=colour, alpha=alpha, lw=0
                )
            axes.text(1.02, base + 0.3, note.get(method, ""), fontsize=7, color=INK, va="center")
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.05, rows)
        axes.set_yticks(np.arange(rows) + 0.3, [short(m) for m in reversed(list(scores))], fontsize=7.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("rank of the score among both sets")
        axes.text(1.02, rows + 0.05, "AUROC", fontsize=7, color=INK, va="bottom")
    return Drawing(name, title, f"{title}: test rows against others for {', '.join(scores)}", figure)


def _densities(inside: Floats, outside: Floats) -> tuple[Floats, Floats]:
    """Return the fractions in bins of equal rank, scaled to a maximum of 1; tied scores have their mean rank."""
    both = np.concatenate([inside, outside])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[inverse] / len(both)
    edges = np.linspace(0, 1, _BINS + 1)
    found = [np.histogram(part, edges)[0] / len(part) for part in np.split(ranks, [len(inside)])]
    top = max(float(f.max()) for f in found)
    return found[0] / top, found[1] / top
