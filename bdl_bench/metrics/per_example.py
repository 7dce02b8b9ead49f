"""Quantities of each row that metrics use: log-probabilities, confidence, uncertainty."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from bdl_bench.metrics import classification, regression
from bdl_bench.metrics.log_space import log_entropy, log_odds_of_top, log_sigmoid, logs
from bdl_bench.metrics.metric import Arrays
from estimators.errors import DataError

__all__ = ["TopLabels", "class_arrays", "confidences", "entropy_order", "information_of_row", "predictive_entropy",
           "top_labels", "variance_of_row"]  # fmt: skip

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class TopLabels(NamedTuple):
    """The most probable class of each row: its probability, its log-odds, and 1 if it is the target.

    The log-odds order rows as the probabilities do, without ties at a probability of 1 in float64.
    """

    confidence: Floats
    log_odds: Floats
    correct: Floats


def class_arrays(arrays: Arrays) -> tuple[Floats, Integers]:
    """Return log-probabilities (M, C) and class indices (M,).

    Each of C independent Bernoulli outputs counts as one example of two classes, (M·C, 2) and (M·C,).

    Args:
        arrays: predictions of classes and targets by name.

    Returns:
        Log-probabilities and class indices.

    Raises:
        DataError: for a target that is not the index of a class.
    """
    targets = arrays["targets"]
    binary = targets.ndim == 2
    _check_indices(targets, 2 if binary else arrays["probs" if "probs" in arrays else "log_probs"].shape[-1])
    if binary:
        return classification.as_two_classes(_log_odds(arrays), targets)
    return _log_probs(arrays), targets.astype(np.int64)


def top_labels(arrays: Arrays) -> TopLabels:
    """Return the most probable class of each row, with arrays (M,); (M, C) for Bernoulli outputs."""
    log_probs, targets = class_arrays(arrays)
    found = (
        classification.confidence(log_probs),
        log_odds_of_top(log_probs),
        classification.correct(log_probs, targets),
    )
    return TopLabels(*(values.reshape(arrays["targets"].shape) for values in found))


def confidences(kind: str, arrays: Arrays) -> Floats:
    """Return minus the epistemic variance as a score of confidence, in the shape of `top_labels`."""
    return -(arrays["epistemic_variance"] if kind == "binary" else variance_of_row(arrays))


def variance_of_row(arrays: Arrays) -> Floats:
    """Return the mean over outputs of the centred variance, or without one of the epistemic variance, (M,).

    For logits the epistemic variance includes that of their common level, which changes no probability: with C classes
    it is tr(Σ centred)/C + 1ᵀΣ1/C². Only a covariance separates the two.
    """
    row: Floats = arrays.get("centred_variance", arrays["epistemic_variance"]).mean(-1)
    return row


def information_of_row(arrays: Arrays) -> Floats:
    """Return the mutual information between label and function, (M,); summed over Bernoulli outputs."""
    found = arrays["mutual_information"]
    row: Floats = found if found.ndim == 1 else found.sum(-1)
    return row


def predictive_entropy(kind: str, arrays: Arrays) -> Floats:
    """Return the entropy of the prediction in nats, (M,): of the classes, of all Bernoulli outputs, or of the Gaussian.

    For one Gaussian output it orders rows as the total variance does.
    """
    if kind == "regression":
        return regression.entropy(arrays["total_variance"])
    if kind == "binary":
        summed: Floats = classification.entropy(_two_classes(arrays)).sum(-1)
        return summed
    return classification.entropy(_log_probs(arrays))


def entropy_order(kind: str, arrays: Arrays) -> Floats:
    """Return a score that orders rows as `predictive_entropy` does, without ties at 0 in float64, (M,).

    For classes and Bernoulli outputs it is the logarithm of the entropy.
    """
    if kind == "regression":
        return predictive_entropy(kind, arrays)
    if kind == "binary":
        summed: Floats = np.logaddexp.reduce(log_entropy(_two_classes(arrays)), axis=-1)
        return summed
    return log_entropy(_log_probs(arrays))


def _two_classes(arrays: Arrays) -> Floats:
    """Return the log-probabilities of both classes of each Bernoulli output, (M, C, 2)."""
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
            remedy="metrics need one hard label per prediction: round or argmax soft labels, remove unlabelled rows.",
        )
