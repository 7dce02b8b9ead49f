"""Error against λ on logarithmic axes, with the fitted slopes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bdl_bench.verify.lambda_sweep import QUADRATIC, LambdaSweep
from bdl_bench.verify.verification import Verification

__all__ = ["STYLE", "sweep_figure", "to_bytes"]

_COLOURS = {"forward": "#b3541e", "central": "#0b5c8a"}
_INK, _GUIDE = "#3b4350", "#cfd5dc"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": _INK,
    "axes.edgecolor": _GUIDE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.hashsalt": "bdl-bench",
}
_COLUMNS = 4


def sweep_figure(verifications: Sequence[Verification]) -> Figure:
    """Return one panel per verification: measured errors as points, and the fitted line over its range of λ."""
    shown = [verification for verification in verifications if verification.sweeps]
    columns = max(1, min(_COLUMNS, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    with rc_context(STYLE):
        width = 5.5 if columns == 1 else 3.3 * columns
        figure = Figure(figsize=(width, 3.4 * lines if columns == 1 else 2.9 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
        for axes, verification in zip(panels, shown, strict=False):
            _draw(axes, verification)
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        if not shown:
            panels[0].text(0.5, 0.5, "no sweep: the curvature is not positive definite", ha="center", va="center")
    return figure


def to_bytes(figure: Figure, form: str) -> bytes:
    """Return the figure as "png" or "svg"."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {}
    with rc_context(STYLE):
        figure.savefig(buffer, format=form, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _draw(axes: Axes, verification: Verification) -> None:
    for difference, sweep in verification.sweeps.items():
        _draw_sweep(axes, difference, sweep)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(QUADRATIC, color=_GUIDE, linewidth=0.8, linestyle=":")
    about = f"{verification.curvature}, P = {verification.n_parameters}"
    title = f"{verification.name}\n{about}\nweights: {verification.subset}"
    axes.set_title(title, fontsize=7)
    axes.set_xlabel("λ")
    axes.set_ylabel("relative error of the covariance")
    axes.legend(frameon=False, fontsize=7)


def _draw_sweep(axes: Axes, difference: str, sweep: LambdaSweep) -> None:
    colour, order = _COLOURS[difference], sweep.order
    steps = [(lam, error) for lam, error in zip(sweep.lams, sweep.errors, strict=True) if error is not None]
    label = f"{difference}: {order.note}" if order.slope is None else f"{difference}: slope {order.slope:.2f}"
    points = [max(error, 1e-17) for _, error in steps]
    axes.plot([lam for lam, _ in steps], points, "o", color=colour, markersize=3.5, label=label)
    if order.slope is not None and order.constant is not None:
        line = [order.constant * lam**order.slope for lam in order.lams]
        axes.plot(order.lams, line, color=colour, linewidth=1)
