"""Tasks with one input: the predictive mean with its band over the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bdl_bench.report.arrays import ArrayView
from bdl_bench.report.figures.bands import band, band_limits
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.sections.context import Context

__all__ = ["Bands", "bands"]


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
