"""Refine the best point of a grid: search for a better one between its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from estimators.runtime.optional import optional_module

__all__ = ["Optimum", "refine_between_neighbours"]

_LEAST_GAIN = 1e-10
"""Relative gain of a score below which a difference is round-off."""


@dataclass(frozen=True)
class Optimum:
    """The location of the smallest score, that score, and the number of evaluations that the search took."""

    location: tuple[float, ...]
    score: float
    evaluations: int = 0


def refine_between_neighbours(
    score: Callable[..., float], start: Optimum, axes: Sequence[Sequence[float]], *, tolerance: float = 1e-4
) -> Optimum:
    """Return the smallest score between the grid neighbours of `start`, by Nelder-Mead in logarithms.

    An axis stays at its start if the start is 0, if the axis has no other positive value, or if moving gains nothing.
    The result is never worse than the start.

    Args:
        score: the function to minimise, one argument per axis.
        start: the best point of the grid.
        axes: the values of the grid, one sequence per axis.
        tolerance: the absolute tolerance of a logarithm.
    """
    minimize = optional_module("scipy.optimize", purpose="tune", install="scipy").minimize
    intervals = [_interval(value, axis) for value, axis in zip(start.location, axes, strict=True)]
    free = [i for i, interval in enumerate(intervals) if interval is not None]
    if not free or not math.isfinite(start.score):
        return start
    bounds = [interval for interval in intervals if interval is not None]
    origin = [math.log(start.location[i]) for i in free]

    def location(logs: Sequence[float]) -> tuple[float, ...]:
        moved = dict(zip(free, logs, strict=True))
        return tuple(
            math.exp(moved[i]) if i in moved and moved[i] != math.log(value) else value
            for i, value in enumerate(start.location)
        )

    found = minimize(
        lambda logs: score(*location(logs)),
        origin,
        method="Nelder-Mead",
        bounds=bounds,
        options={"initial_simplex": _simplex(origin, bounds), "xatol": tolerance, "fatol": _LEAST_GAIN},
    )
    least = start.score - _LEAST_GAIN * max(1.0, abs(start.score))
    if not found.fun < least:
        return Optimum(start.location, start.score, start.evaluations + int(found.nfev))
    refined = Optimum(location(found.x), float(found.fun), start.evaluations + int(found.nfev))
    return _undo_idle_moves(score, start, refined)


def _undo_idle_moves(score: Callable[..., float], start: Optimum, refined: Optimum) -> Optimum:
    """Move each axis back to the start if that costs nothing, so that a flat axis does not seem to be tuned."""
    for i, value in enumerate(start.location):
        location = (*refined.location[:i], value, *refined.location[i + 1 :])
        if location == refined.location:
            continue
        found = score(*location)
        evaluations = refined.evaluations + 1
        if found <= refined.score + _LEAST_GAIN * max(1.0, abs(refined.score)):
            refined = Optimum(location, found, evaluations)
        else:
            refined = Optimum(refined.location, refined.score, evaluations)
    return refined


def _interval(value: float, axis: Sequence[float]) -> tuple[float, float] | None:
    """Return the logarithms of a value's neighbours, or of the value itself at an end; None if it cannot move."""
    positive = sorted(v for v in axis if v > 0)
    if value <= 0 or len(positive) < 2:
        return None
    i = positive.index(value)
    return math.log(positive[max(i - 1, 0)]), math.log(positive[min(i + 1, len(positive) - 1)])


def _simplex(origin: list[float], bounds: list[tuple[float, float]]) -> list[list[float]]:
    """Return the origin, and one corner per axis at half an interval from it, inside the bounds."""
    corners = [list(origin)]
    for i, (low, high) in enumerate(bounds):
        corner = list(origin)
        corner[i] += (high - origin[i]) / 2 if high > origin[i] else (low - origin[i]) / 2
        corners.append(corner)
    return corners
