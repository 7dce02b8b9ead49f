"""The points of a tuning as lines and surfaces: the best score at each value, all else free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bdl_bench.records.record import Tuning

__all__ = ["SCALE", "Line", "Surface", "line", "surface"]

Floats = NDArray[np.float64]
SCALE = "variance_scale"
_FEWEST = 3
"""Values that a line or a side of a surface needs to be worth drawing."""


@dataclass(frozen=True)
class Line:
    """The best score over one quantity, the pick, and whether it lies at the end of the range."""

    x: Floats
    score: Floats
    pick: float
    at_boundary: bool


@dataclass(frozen=True)
class Surface:
    """The best scores (A, B) over the axis (A,) and the variance scale (B,); NaN where not tried."""

    axis: Floats
    scale: Floats
    score: Floats
    pick: tuple[float, float]
    at_boundary: bool


def line(tuning: Tuning, quantity: str) -> Line | None:
    """Over "value" (the axis) or another part of a point; None for fewer than three positive values."""
    values, scores = _columns(tuning, quantity)
    if not len(values):
        return None
    x, place = np.unique(values, return_inverse=True)
    best = np.full(len(x), np.inf)
    np.minimum.at(best, place, scores)
    if len(x) < _FEWEST:
        return None
    return Line(x, best, _pick(tuning, quantity, x, best), _at_edge(tuning, quantity))


def surface(tuning: Tuning) -> Surface | None:
    """Over axis and variance scale; None for fewer than three positive values of either."""
    values, scales, scores = _columns(tuning, "value", SCALE)
    if not len(values):
        return None
    axis, a = np.unique(values, return_inverse=True)
    scale, b = np.unique(scales, return_inverse=True)
    if min(len(axis), len(scale)) < _FEWEST:
        return None
    best = np.full((len(axis), len(scale)), np.inf)
    np.minimum.at(best, (a, b), scores)
    best[np.isinf(best)] = np.nan
    over_axis, over_scale = np.nanmin(best, axis=1), np.nanmin(best, axis=0)
    pick = _pick(tuning, "value", axis, over_axis), _pick(tuning, SCALE, scale, over_scale)
    return Surface(axis, scale, best, pick, _at_edge(tuning, "value") or _at_edge(tuning, SCALE))


def _columns(tuning: Tuning, *names: str) -> list[Floats]:
    """These parts of the points that have them all, positive, and the score, finite, as the last."""
    wanted = (*names, "score")
    rows = [[p.get(name) for name in wanted] for p in tuning.points]
    table = np.array([row for row in rows if None not in row], dtype=np.float64).reshape(-1, len(wanted))
    kept = table[np.isfinite(table).all(1) & (table[:, :-1] > 0).all(1)]
    return list(kept.T)


def _pick(tuning: Tuning, quantity: str, tried: Floats, best: Floats) -> float:
    """What was chosen, which may lie between the points, moved into the range of the figure."""
    chosen = tuning.chosen.get(quantity)
    if chosen is None:
        chosen = float(tried[int(np.argmin(best))])
    return float(np.clip(chosen, tried[0], tried[-1]))


def _at_edge(tuning: Tuning, quantity: str) -> bool:
    return bool({quantity, tuning.option if quantity == "value" else quantity} & set(tuning.at_boundary))
