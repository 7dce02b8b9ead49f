"""Times of methods that run alternately, so that other load affects all of them: medians and spreads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Timing", "interleaved", "timed"]

REPEATS = 3
_LARGE_SPREAD = 0.3  # above it, the repeats are doubled


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the repeats, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(largest − smallest)/median of the three repeats nearest to the median."""
        nearest = sorted(self.seconds, key=lambda s: abs(s - self.median))[:REPEATS]
        return (max(nearest) - min(nearest)) / self.median


def timed(step: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def interleaved(methods: Sequence[Callable[[], Iterable[float]]], repeats: int = REPEATS) -> list[list[Timing]]:
    """Run methods alternately; each returns the seconds of its steps.

    There are `repeats` rounds, and as many again if the spread of a step is above 30 %. Returns one list per method,
    with the timing of each step.
    """
    rounds: list[list[list[float]]] = []
    while True:
        rounds += [[list(method()) for method in methods] for _ in range(repeats)]
        found = [
            [Timing(tuple(step)) for step in zip(*(one[i] for one in rounds), strict=True)] for i in range(len(methods))
        ]
        if len(rounds) > repeats or all(timing.spread <= _LARGE_SPREAD for timings in found for timing in timings):
            return found
