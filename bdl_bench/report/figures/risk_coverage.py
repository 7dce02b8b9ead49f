"""Risk–coverage curves (Geifman and El-Yaniv 2017): the error rate of the most confident rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bdl_bench.report.figures.canvas import GUIDE, Drawing, Margins, panel
from bdl_bench.report.figures.labels import stacked
from bdl_bench.report.palette import Palette

__all__ = ["Curve", "risk_coverage_figures"]

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def risk_coverage_figures(curves: Mapping[str, Curve], palette: Palette, *, risk: str) -> list[Drawing]:
    """Draw one figure per family: its methods in colour, all others in grey; `curves` are (coverage, risk)."""
    top = 1.08 * max(float(r[c >= 0.1].max()) for c, r in curves.values()) or 1.0
    drawings = []
    for family, members in palette.families(curves).items():
        room = 1 + 0.13 * len(members)
        with panel("coverage", risk, size=(2.7, 2.2), margins=Margins(left=0.56)) as axes:
            for method in curves.keys() - set(members):
                axes.plot(*curves[method], color=GUIDE, lw=0.7, zorder=1)
            for method in members:
                style = palette[method]
                axes.plot(*curves[method], color=style.colour, ls=style.dash, lw=1.4, zorder=3)
            axes.set_xlim(0, 1.0)
            axes.set_ylim(0, top * room)
            axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "¼", "½", "¾", "1"))
            stacked(axes, members, palette)
        words = f"Risk against coverage of {', '.join(members)}; at half coverage: " + ", ".join(
            f"{m} {np.interp(0.5, *curves[m]):.3g}" for m in members
        )
        drawings.append(Drawing.of(axes, f"risk-coverage {family}", family, words))
    return drawings
