"""Predictive mean ± 2 standard deviations over one input (Foong et al. 2019; McInerney and Kallus 2025, Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdl_bench.report.figures.canvas import INK, Drawing, panel
from bdl_bench.report.palette import Style

__all__ = ["band", "band_limits"]

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]


def band(method: str, style: Style, arrays: Arrays, *, limits: tuple[float, float], data: Arrays | None) -> Drawing:
    """Draw the mean, ± 2 epistemic std (dark) and ± 2 total std (light), and the rows x, targets of `data` in grey."""
    order = np.argsort(arrays["x"].reshape(-1))
    x, mean = arrays["x"].reshape(-1)[order], arrays["mean"].reshape(len(order), -1)[order, 0]
    with panel("x", "y") as axes:
        for name, alpha in (("total_variance", 0.15), ("epistemic_variance", 0.3)):
            if name in arrays:
                half = 2 * np.sqrt(np.maximum(arrays[name].reshape(len(order), -1)[order, 0], 0.0))
                axes.fill_between(x, mean - half, mean + half, color=style.colour, alpha=alpha, lw=0)
        axes.plot(x, mean, color=style.colour, lw=1.3)
        if data is not None:
            axes.plot(data["x"].reshape(-1), data["targets"].reshape(-1), ".", color=INK, ms=2, alpha=0.5)
        axes.set_xlim(float(x[0]), float(x[-1]))
        axes.set_ylim(*limits)
    return Drawing.of(axes, f"band {method}", method, f"Mean and two standard deviations of {method} over x")


def band_limits(shown: list[Arrays]) -> tuple[float, float]:
    """Return common limits of y: they contain the bands of nine in ten methods."""
    lows, highs = [], []
    for arrays in shown:
        half = 2 * np.sqrt(np.maximum(arrays.get("total_variance", arrays["epistemic_variance"]), 0.0))
        lows.append(float((arrays["mean"] - half).min()))
        highs.append(float((arrays["mean"] + half).max()))
    return float(np.quantile(lows, 0.1)), float(np.quantile(highs, 0.9))
