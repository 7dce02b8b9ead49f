"""A metric: its key in a record, how to read it, and how it is computed from the arrays of a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["RELEVANT_NATS", "RELEVANT_RATE", "RELEVANT_SHARE", "Arrays", "Metric"]

RELEVANT_NATS = 0.01
"""The smallest relevant difference of a mean log score: predicted probabilities or densities that are higher by 1 %."""
RELEVANT_RATE = 0.001
"""The smallest relevant difference of a rate between 0 and 1, such as an accuracy: a tenth of a percentage point."""
RELEVANT_SHARE = 0.01
"""The smallest relevant difference of a metric with a unit, such as RMSE, as a share of the value of the baseline."""

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[np.float64]]
"""The arrays of a record, in the layout of `bdl_bench.metrics.groups`."""


@dataclass(frozen=True)
class Metric:
    """One number that scores a set of predictions.

    A metric has either `scores`, if it is a mean over rows, or `compute`.

    Args:
        key: the name in a record, such as "cls/NLL".
        label: the name in a table.
        reading: how to read the number, in one line.
        better: which direction is better; None if neither is.
        scores: function of the arrays that returns one number per row, (M,). Their mean is the metric.
        compute: function of the arrays that returns the metric, for metrics that are not a mean over rows.
        root: whether the metric is the square root of the mean of `scores`.
        nominal: the value of a calibrated prediction; None if there is none.
        relevant: the smallest relevant difference, in the unit of the metric; None: 1 % of the value of the baseline.

    Example:
        >>> import numpy as np
        >>> from bdl_bench.metrics import Metric
        >>> mae = Metric("reg/MAE", "MAE", "mean absolute error", "lower",
        ...              scores=lambda arrays: abs(arrays["mean"] - arrays["targets"]).mean(-1))
        >>> mae.value({"mean": np.array([[1.0], [2.0]]), "targets": np.array([[1.5], [2.5]])})
        0.5
    """

    key: str
    label: str
    reading: str
    better: Literal["lower", "higher"] | None
    scores: Callable[[Arrays], Floats] | None = None
    compute: Callable[[Arrays], float] | None = None
    root: bool = False
    nominal: float | None = None
    relevant: float | None = None

    def smallest_relevant(self, reference: float) -> float:
        """Return the difference below which two methods count as equal, even if a test finds the difference.

        Args:
            reference: the value of the baseline.

        Returns:
            The difference, in the unit of the metric.
        """
        return abs(reference) * RELEVANT_SHARE if self.relevant is None else self.relevant

    def value(self, arrays: Arrays) -> float:
        """Return the metric of one set of predictions.

        Args:
            arrays: predictions and targets of M rows, by name.

        Returns:
            The metric, in the unit that `reading` names.
        """
        if self.compute is not None:
            return float(self.compute(arrays))
        assert self.scores is not None
        mean = float(self.scores(arrays).mean())
        return float(np.sqrt(mean)) if self.root else mean
