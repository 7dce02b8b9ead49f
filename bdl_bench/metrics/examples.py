"""The rows of one part as the metrics want them: class probabilities, scores of confidence and of uncertainty."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics import classification, regression
from bdl_bench.metrics.metric import Arrays

__all__ = ["class_arrays", "confidences", "predictive_entropy", "top_labels", "variance_of_row"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def class_arrays(arrays: Arrays) -> tuple[Floats, Integers]:
    """Class probabilities (M, C) and indices (M,); independent Bernoulli outputs count as examples of two classes."""
    probs, targets = arrays["probs"], arrays["targets"]
    if targets.ndim == 2:
        return classification.as_two_classes(probs, targets)
    return probs, targets.astype(np.int64)


def top_labels(arrays: Arrays) -> tuple[Floats, Floats]:
    """Confidence in the top label, and 1 where it is right, (M,); (M, C) for Bernoulli outputs."""
    probs, targets = class_arrays(arrays)
    shape = arrays["targets"].shape
    return classification.confidence(probs).reshape(shape), classification.correct(probs, targets).reshape(shape)


def confidences(kind: str, arrays: Arrays) -> Floats:
    """Minus the epistemic variance as a score of confidence, in the shape of `top_labels`."""
    return -(arrays["epistemic_variance"] if kind == "binary" else variance_of_row(arrays))


def variance_of_row(arrays: Arrays) -> Floats:
    """The mean over outputs of the centred variance, where there is one, else of the epistemic variance, (M,).

    For logits the latter holds the variance of their common level, which changes no probability: with C classes it is
    tr(Σ centred)/C + 1ᵀΣ1/C². Variances alone, without covariances, cannot tell the two apart.
    """
    row: Floats = arrays.get("centred_variance", arrays["epistemic_variance"]).mean(-1)
    return row


def predictive_entropy(kind: str, arrays: Arrays) -> Floats:
    """The entropy of the prediction, nats, (M,): of the classes, of all Bernoulli outputs, or of the Gaussian.

    With one output the Gaussian's orders rows as the total variance does.
    """
    if kind == "regression":
        return regression.entropy(arrays["total_variance"])
    probs = arrays["probs"]
    if kind == "binary":
        return classification.entropy(probs) + classification.entropy(1 - probs)
    return classification.entropy(probs)
