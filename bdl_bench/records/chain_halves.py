"""Predictions by the even and by the odd chains of a posterior that was sampled, for its noise floor in a report."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from bdl_bench.metrics.fidelity import HALVES
from bdl_bench.problem.flatten import flat_rows
from bdl_bench.problem.queries import Query
from estimators.likelihoods import Likelihood
from estimators.likelihoods.prediction import Prediction
from estimators.numerics.pytrees import PyTree

__all__ = ["HalfPredictor", "half_fields"]


@runtime_checkable
class HalfPredictor(Protocol):
    """An estimator whose chains make two independent predictions, such as `ReferencePosterior`."""

    def half_predictions(self, x: PyTree) -> tuple[Prediction, Prediction]:
        """Return the predictions by the even and by the odd chains."""


def half_fields(estimator: HalfPredictor, query: Query, likelihood: Likelihood) -> dict[str, Tensor]:
    """Return mean, epistemic variance and probabilities of both halves at a batch: `even_mean`, `odd_mean`, and so on.

    Args:
        estimator: fitted.
        query: a batch of inputs.
        likelihood: that of the problem.

    Returns:
        Tensors by name, with one row per labelled position.
    """
    found: dict[str, Tensor] = {}
    for half, prediction in zip(HALVES, estimator.half_predictions(query.x), strict=True):
        flat, _ = flat_rows(prediction, query.y, likelihood)
        for name in ("mean", "epistemic_variance", "probs"):
            tensor = getattr(flat, name)
            if tensor is not None:
                found[f"{half}_{name}"] = tensor
    return found
