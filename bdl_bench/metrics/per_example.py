"""The rows of one part as the metrics want them: log-probabilities, scores of confidence and of uncertainty."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from bdl_bench.metrics import classification, regression
from bdl_bench.metrics.log_space import log_entropy, log_odds_of_top, log_sigmoid, logs
from bdl_bench.metrics.metric import Arrays
from estimators.errors import DataError

__all__ = ["TopLabels", "class_arrays", "confidences", "entropy_order", "predictive_entropy", "top_labels",
           "variance_of_row"]  # fmt: skip

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class TopLabels(NamedTuple):
    """Of the most probable class of each row: its probability, the log-odds of that, and 1 where it is the target.

    The log-odds order the rows as the probabilities do, and do not tie where these are 1 in float64.
    """

    confidence: Floats
    log_odds: Floats
    correct: Floats


def class_arrays(arrays: Arrays) -> tuple[Floats, Integers]:
    """Log-probabilities (M, C) and class indices (M,); independent Bernoulli outputs count as examples of two classes.

    Errors: DataError for a target that is not the index of a class.
    """
    targets = arrays["targets"]
    binary = targets.ndim == 2
    _check_indices(targets, 2 if binary else arrays["probs" if "probs" in arrays else "log_probs"].shape[-1])
    if binary:
        return classification.as_two_classes(_log_odds(arrays), targets)
    return _log_probs(arrays), targets.astype(np.int64)


def top_labels(arrays: Arrays) -> TopLabels:
    """Of each row, (M,); (M, C) for Bernoulli outputs."""
    log_probs, targets = class_arrays(arrays)
    found = (
        classification.confidence(log_probs),
        log_odds_of_top(log_probs),
        classification.correct(log_probs, targets),
    )
    return TopLabels(*(values.reshape(arrays["targets"].shape) for values in found))


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
    if kind == "binary":
        summed: Floats = classification.entropy(_two_classes(arrays)).sum(-1)
        return summed
    return classification.entropy(_log_probs(arrays))


def entropy_order(kind: str, arrays: Arrays) -> Floats:
    """A score that orders rows as `predictive_entropy` does, (M,), and does not tie where that is 0 in float64.

    For classes and Bernoulli outputs, the logarithm of the entropy.
    """
    if kind == "regression":
        return predictive_entropy(kind, arrays)
    if kind == "binary":
        summed: Floats = np.logaddexp.reduce(log_entropy(_two_classes(arrays)), axis=-1)
        return summed
    return log_entropy(_log_probs(arrays))


def _two_classes(arrays: Arrays) -> Floats:
    """(M, C, 2)."""
    odds = _log_odds(arrays)
    return np.stack([log_sigmoid(-odds), log_sigmoid(odds)], axis=-1)


def _log_probs(arrays: Arrays) -> Floats:
    return arrays["log_probs"] if "log_probs" in arrays else logs(arrays["probs"])


def _log_odds(arrays: Arrays) -> Floats:
    if "log_odds" in arrays:
        return arrays["log_odds"]
    odds: Floats = logit(arrays["probs"])
    return odds


def _check_indices(targets: Floats, n_classes: int) -> None:
    bad = (targets != np.floor(targets)) | (targets < 0) | (targets >= n_classes)
    if bad.any():
        row = int(np.argwhere(bad)[0, 0])
        raise DataError(
            f"targets that are class indices 0..{n_classes - 1}",
            received=f"{targets[row]} in row {row}",
            remedy="metrics need one hard label a prediction: round or argmax soft labels, leave out unlabelled rows.",
        )
