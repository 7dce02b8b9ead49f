"""Tasks with one input: the mean with its band over the input (Foong et al. 2019; McInerney and Kallus 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from bdl_bench.report.arrays import ArrayView
from bdl_bench.report.figures.canvas import INK, Drawing, panel
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.palette import Style
from bdl_bench.report.sections.context import Context

__all__ = ["Bands", "band_limits", "bands", "draw_band"]

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Bands:
    """One panel per method, of one seed."""

    template: ClassVar[str] = "bands.html"
    seed: int
    pictures: list[Picture]


def bands(context: Context) -> Bands | None:
    """Return the untuned bands; None if the records have no one-dimensional inputs in `plot_grid/` or `ood/<set>/`."""
    results = context.results
    seed = results.seeds[0]
    methods = [m for m in results.methods if seed in results.finished[m]]
    shown = {m: _one_input(results.predictions(m, seed)) for m in methods}
    found = {m: view for m, view in shown.items() if view is not None}
    if not found:
        return None
    limits = band_limits(list(found.values()))
    panels = (
        band(m, context.palette[m], view, limits=limits, data=_rows(results.predictions(m, seed)))
        for m, view in found.items()
    )
    return Bands(seed, context.render(panels))


def _one_input(arrays: ArrayView) -> ArrayView | None:
    """Return the first set of rows with one-dimensional inputs and predictions."""
    for prefix in ("plot_grid", *(f"ood/{name}" for name in arrays.sets("ood"))):
        view = arrays.subset(prefix)
        if {"x", "mean", "epistemic_variance"} <= view.keys() and view["x"].size == len(view["mean"]):
            return view
    return None


def _rows(arrays: ArrayView) -> ArrayView | None:
    """Return the training rows of the record, or else its test rows, which are shown as points."""
    for view in (arrays.subset("train"), arrays):
        if {"x", "targets"} <= view.keys() and view["x"].size == view["targets"].size:
            return view
    return None


def band(method: str, style: Style, arrays: Arrays, *, limits: tuple[float, float], data: Arrays | None) -> Drawing:
    """Draw the mean, ± 2 epistemic std (dark) and ± 2 total std (light), and the rows x, targets of `data` in grey."""
    with panel("x", "y") as axes:
        draw_band(axes, style, arrays, limits=limits, data=data)
    return Drawing.of(axes, f"band {method}", method, f"Mean and two standard deviations of {method} over x")


def draw_band(
    axes: Axes, style: Style, arrays: Arrays, *, limits: tuple[float, float], data: Arrays | None = None
) -> None:
    """Draw the band of `band` into axes."""
    order = np.argsort(arrays["x"].reshape(-1))
    x, mean = arrays["x"].reshape(-1)[order], arrays["mean"].reshape(len(order), -1)[order, 0]
    for name, alpha in (("total_variance", 0.15), ("epistemic_variance", 0.3)):
        if name in arrays:
            half = 2 * np.sqrt(np.maximum(arrays[name].reshape(len(order), -1)[order, 0], 0.0))
            axes.fill_between(x, mean - half, mean + half, color=style.colour, alpha=alpha, lw=0)
    axes.plot(x, mean, color=style.colour, lw=1.3)
    if data is not None:
        axes.plot(data["x"].reshape(-1), data["targets"].reshape(-1), ".", color=INK, ms=2, alpha=0.5)
    axes.set_xlim(float(x[0]), float(x[-1]))
    axes.set_ylim(*limits)


def band_limits(shown: list[Arrays]) -> tuple[float, float]:
    """Return common limits of y: they contain the bands of nine in ten methods."""
    lows, highs = [], []
    for arrays in shown:
        half = 2 * np.sqrt(np.maximum(arrays.get("total_variance", arrays["epistemic_variance"]), 0.0))
        lows.append(float((arrays["mean"] - half).min()))
        highs.append(float((arrays["mean"] + half).max()))
    return float(np.quantile(lows, 0.1)), float(np.quantile(highs, 0.9))
