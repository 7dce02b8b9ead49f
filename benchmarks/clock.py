"""Times of methods that take turns in one run: medians, and how far the repeats lie apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Timing", "interleaved", "timed"]

REPEATS = 3
_WIDE = 0.3


@dataclass(frozen=True)
class Timing:
    """Seconds of the repeats."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(largest − smallest)/median of the three repeats nearest to the median."""
        nearest = sorted(self.seconds, key=lambda s: abs(s - self.median))[:REPEATS]
        return (max(nearest) - min(nearest)) / self.median


def timed(step: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def interleaved(methods: Sequence[Callable[[], Iterable[float]]], repeats: int = REPEATS) -> list[list[Timing]]:
    """Each method measures its own steps, in seconds; the methods take turns.

    As many rounds as `repeats`, and as many again where the spread of a step is above 30 %. A list of timings by step,
    one a method.
    """
    rounds: list[list[list[float]]] = []
    while True:
        rounds += [[list(method()) for method in methods] for _ in range(repeats)]
        found = [
            [Timing(tuple(step)) for step in zip(*(one[i] for one in rounds), strict=True)] for i in range(len(methods))
        ]
        if len(rounds) > repeats or all(timing.spread <= _WIDE for timings in found for timing in timings):
            return found
