"""Tuning trials as lines and grids: the best score at each value, minimised over all other options."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bdl_bench.records.record import Tuning

__all__ = ["SCALE", "Line", "ScoreGrid", "line", "score_grid"]

Floats = NDArray[np.float64]
SCALE = "variance_scale"
_FEWEST = 3
"""Values below this number are not drawn as a line or as a side of a grid."""


@dataclass(frozen=True)
class Line:
    """The best score over one quantity, and the selected value."""

    x: Floats
    score: Floats
    selected: float
    at_boundary: bool


@dataclass(frozen=True)
class ScoreGrid:
    """The best scores (A, B) over the tuned option (A,) and the variance scale (B,); NaN without a trial."""

    option: Floats
    scale: Floats
    score: Floats
    selected: tuple[float, float]
    at_boundary: bool


def line(tuning: Tuning, quantity: str) -> Line | None:
    """Return the best score over "value" (the tuned option) or another quantity; None for fewer than three values."""
    values, scores = _columns(tuning, quantity)
    if not len(values):
        return None
    x, index = np.unique(values, return_inverse=True)
    best = np.full(len(x), np.inf)
    np.minimum.at(best, index, scores)
    if len(x) < _FEWEST:
        return None
    return Line(x, best, _selected(tuning, quantity, x, best), _at_boundary(tuning, quantity))


def score_grid(tuning: Tuning) -> ScoreGrid | None:
    """Return the best score over option and variance scale; None for fewer than three values of either."""
    values, scales, scores = _columns(tuning, "value", SCALE)
    if not len(values):
        return None
    option, a = np.unique(values, return_inverse=True)
    scale, b = np.unique(scales, return_inverse=True)
    if min(len(option), len(scale)) < _FEWEST:
        return None
    best = np.full((len(option), len(scale)), np.inf)
    np.minimum.at(best, (a, b), scores)
    best[np.isinf(best)] = np.nan
    over_option, over_scale = np.nanmin(best, axis=1), np.nanmin(best, axis=0)
    selected = _selected(tuning, "value", option, over_option), _selected(tuning, SCALE, scale, over_scale)
    return ScoreGrid(option, scale, best, selected, _at_boundary(tuning, "value") or _at_boundary(tuning, SCALE))


def _columns(tuning: Tuning, *names: str) -> list[Floats]:
    """Return these quantities of the trials that have all of them, positive, and then the score, finite."""
    wanted = (*names, "score")
    rows = [[p.get(name) for name in wanted] for p in tuning.points]
    table = np.array([row for row in rows if None not in row], dtype=np.float64).reshape(-1, len(wanted))
    kept = table[np.isfinite(table).all(1) & (table[:, :-1] > 0).all(1)]
    return list(kept.T)


def _selected(tuning: Tuning, quantity: str, tried: Floats, best: Floats) -> float:
    """Return the selected value, which may lie between the trials, clipped to the range of the figure."""
    chosen = tuning.chosen.get(quantity)
    if chosen is None:
        chosen = float(tried[int(np.argmin(best))])
    return float(np.clip(chosen, tried[0], tried[-1]))


def _at_boundary(tuning: Tuning, quantity: str) -> bool:
    return bool({quantity, tuning.option if quantity == "value" else quantity} & set(tuning.at_boundary))
