"""The metrics of each kind of likelihood, under the names of the field, with how to read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics import calibration, classification, regression

__all__ = ["LEVELS", "METRICS", "Arrays", "Metric", "class_arrays", "evaluate"]

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[np.float64]]
"""mean, epistemic_variance (M, C), targets, and total_variance (M, C) or probs (M, C)."""

LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Metric:
    """One number for a set of predictions.

    `scores` gives one number an example, whose mean (or its square root, where `root`) is the metric; None where a
    metric does not split into examples, then `whole` computes it. `better` is the direction, or None where neither is;
    `nominal` is the value that a calibrated prediction has.
    """

    key: str
    label: str
    reading: str
    better: Literal["lower", "higher"] | None
    scores: Callable[[Arrays], Floats] | None = None
    whole: Callable[[Arrays], float] | None = None
    root: bool = False
    nominal: float | None = None

    def value(self, arrays: Arrays) -> float:
        """The metric of one set of predictions."""
        if self.scores is None:
            assert self.whole is not None
            return self.whole(arrays)
        mean = float(self.scores(arrays).mean())
        return mean**0.5 if self.root else mean


def evaluate(kind: str, arrays: Arrays) -> dict[str, float]:
    """Every metric of that kind ("regression", "classification", "binary")."""
    return {metric.key: metric.value(arrays) for metric in METRICS[kind]}


def class_arrays(arrays: Arrays) -> tuple[Floats, NDArray[np.int64]]:
    """Class probabilities (M, C) and indices (M,); independent Bernoulli outputs count as examples of two classes."""
    probs, targets = arrays["probs"], arrays["targets"]
    if targets.ndim == 2:
        return classification.as_two_classes(probs, targets)
    return probs, targets.astype(np.int64)


def _class_scores(function: Callable[[Floats, NDArray[np.int64]], Floats], arrays: Arrays) -> Floats:
    return function(*class_arrays(arrays))


def _calibration_error(function: Callable[[Floats, Floats], float], arrays: Arrays) -> float:
    probs, targets = class_arrays(arrays)
    return function(classification.confidence(probs), classification.correct(probs, targets))


def _gaussian(function: Callable[..., Floats], arrays: Arrays, **keywords: float) -> Floats:
    return function(arrays["mean"], arrays["total_variance"], arrays["targets"], **keywords)


def _squared_error(arrays: Arrays) -> Floats:
    return regression.squared_error(arrays["mean"], arrays["targets"])


def _width(arrays: Arrays, *, level: float) -> Floats:
    return regression.width(arrays["total_variance"], level=level)


def _coverage_metric(level: float) -> Metric:
    return Metric(
        f"cov/{level * 100:g}",
        f"cov. {level * 100:g} %",
        f"share of targets inside the central {level * 100:g} % interval",
        None,
        partial(_gaussian, regression.coverage, level=level),
        nominal=level,
    )


_CLASSIFICATION = (
    Metric("cls/NLL", "NLL", "mean −log p(y), nats", "lower", partial(_class_scores, classification.nll)),
    Metric("cls/Brier", "Brier", "squared distance to the one-hot target, 0 to 2", "lower",
           partial(_class_scores, classification.brier)),
    Metric("cls/Acc", "Accuracy", "share of correct top labels", "higher",
           partial(_class_scores, classification.correct)),
    Metric("cal/ECE", "ECE", "calibration error, 15 bins of equal width", "lower",
           whole=partial(_calibration_error, calibration.ece)),
    Metric("cal/aECE", "aECE", "calibration error, 15 bins of equal mass", "lower",
           whole=partial(_calibration_error, calibration.adaptive_ece)),
)  # fmt: skip

_REGRESSION = (
    Metric("reg/NLL", "NLL", "mean −log p(y), nats, noise included", "lower", partial(_gaussian, regression.nll)),
    Metric("reg/RMSE", "RMSE", "root mean squared error of the mean", "lower", _squared_error, root=True),
    Metric("reg/CRPS", "CRPS", "continuous ranked probability score", "lower", partial(_gaussian, regression.crps)),
    *map(_coverage_metric, LEVELS),
    Metric("width/95", "width 95 %", "mean width of the central 95 % interval", None, partial(_width, level=0.95)),
)

METRICS: dict[str, tuple[Metric, ...]] = {
    "regression": _REGRESSION,
    "classification": _CLASSIFICATION,
    "binary": _CLASSIFICATION,
}
