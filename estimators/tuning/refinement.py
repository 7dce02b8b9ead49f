"""From the best point of a grid to the optimum between its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from estimators.runtime.optional import optional_module

__all__ = ["Optimum", "between_neighbours"]

_GAIN = 1e-10  # relative: less is round-off


@dataclass(frozen=True)
class Optimum:
    """Where a score is least, the score, and how often it was computed to find that."""

    place: tuple[float, ...]
    score: float
    evaluations: int = 0


def between_neighbours(
    score: Callable[..., float], start: Optimum, axes: Sequence[Sequence[float]], *, tolerance: float = 1e-4
) -> Optimum:
    """The least score within the cells of a grid that meet at `start`, in logarithms, by Nelder and Mead's simplex.

    An axis on which the start is 0, or which has no other positive value, stays as it is, and one on which nothing is
    gained. Never worse than the start.
    """
    minimize = optional_module("scipy.optimize", purpose="tune", install="scipy").minimize
    cells = [_cell(value, axis) for value, axis in zip(start.place, axes, strict=True)]
    free = [i for i, cell in enumerate(cells) if cell is not None]
    if not free or not math.isfinite(start.score):
        return start
    bounds = [cell for cell in cells if cell is not None]
    origin = [math.log(start.place[i]) for i in free]

    def place(logs: Sequence[float]) -> tuple[float, ...]:
        moved = dict(zip(free, logs, strict=True))
        return tuple(
            math.exp(moved[i]) if i in moved and moved[i] != math.log(value) else value
            for i, value in enumerate(start.place)
        )

    found = minimize(
        lambda logs: score(*place(logs)),
        origin,
        method="Nelder-Mead",
        bounds=bounds,
        options={"initial_simplex": _simplex(origin, bounds), "xatol": tolerance, "fatol": _GAIN},
    )
    least = start.score - _GAIN * max(1.0, abs(start.score))
    if not found.fun < least:
        return Optimum(start.place, start.score, start.evaluations + int(found.nfev))
    ended = Optimum(place(found.x), float(found.fun), start.evaluations + int(found.nfev))
    return _without_idle_moves(score, start, ended)


def _without_idle_moves(score: Callable[..., float], start: Optimum, ended: Optimum) -> Optimum:
    """Each axis back at the start where that costs nothing: a flat one should not seem to have been tuned."""
    for i, value in enumerate(start.place):
        back = (*ended.place[:i], value, *ended.place[i + 1 :])
        if back == ended.place:
            continue
        there = score(*back)
        kept = there <= ended.score + _GAIN * max(1.0, abs(ended.score))
        ended = Optimum(back if kept else ended.place, there if kept else ended.score, ended.evaluations + 1)
    return ended


def _cell(value: float, axis: Sequence[float]) -> tuple[float, float] | None:
    """Logarithms of the neighbours of a value, the value itself where it has none."""
    positive = sorted(v for v in axis if v > 0)
    if value <= 0 or len(positive) < 2:
        return None
    i = positive.index(value)
    return math.log(positive[max(i - 1, 0)]), math.log(positive[min(i + 1, len(positive) - 1)])


def _simplex(origin: list[float], bounds: list[tuple[float, float]]) -> list[list[float]]:
    """The origin, and half a cell from it along each axis, inwards."""
    corners = [list(origin)]
    for i, (low, high) in enumerate(bounds):
        corner = list(origin)
        corner[i] += (high - origin[i]) / 2 if high > origin[i] else (low - origin[i]) / 2
        corners.append(corner)
    return corners
