"""What a metric is: a key of the field, how to read it, and how it comes from the arrays of a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrays", "Metric", "Sample", "flat"]

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[np.float64]]
"""The arrays of a record, in the layout of `bdl_bench.metrics.groups`."""

Sample = tuple[tuple[Floats, ...], ...]
"""Groups of rows that are drawn apart (in- and out-of-distribution, severities); arrays of a group share their rows."""


@dataclass(frozen=True)
class Metric:
    """One number for a set of predictions.

    `scores` gives one number a row, whose mean (or its square root, where `root`) is the metric; None where a metric
    does not split into rows. Then `rows` gives what it is computed from, and `whole` computes it along the last axis of
    each array. `better` is the direction, or None where neither is; `nominal` is what a calibrated prediction has.
    """

    key: str
    label: str
    reading: str
    better: Literal["lower", "higher"] | None
    scores: Callable[[Arrays], Floats] | None = None
    rows: Callable[[Arrays], Sample] | None = None
    whole: Callable[[Sample], Floats] | None = None
    root: bool = False
    nominal: float | None = None

    def value(self, arrays: Arrays) -> float:
        """The metric of one set of predictions."""
        return float(self.statistic(flat(self.sample(arrays))))

    def sample(self, arrays: Arrays) -> Sample:
        """What a bootstrap resamples, rows first."""
        if self.scores is not None:
            return ((self.scores(arrays),),)
        assert self.rows is not None
        return self.rows(arrays)

    def statistic(self, sample: Sample) -> Floats:
        """The metric of samples (..., M), along the last axis."""
        if self.whole is not None:
            return self.whole(sample)
        mean: Floats = sample[0][0].mean(-1)
        return np.sqrt(mean) if self.root else mean


def flat(sample: Sample) -> Sample:
    """The same with one axis an array: the outputs of a row follow each other."""
    return tuple(tuple(array.reshape(-1) for array in group) for group in sample)
