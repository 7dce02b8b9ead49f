"""What a fitted method says of every row of a problem, as named arrays: those of a record.

Test rows have plain names: `mean`, `epistemic_variance`, `total_variance` or `probs`, `targets`; beside `probs` there
are `log_probs` of classes, or `log_odds` of binary outputs. Others have a prefix:
`validation/`, `ood/<set>/`, `shift/<set>/`; and what the tuned method says of all of them is under `tuned/` once more.
A set whose loader knows no targets has none. Where a problem has a band, `band/` and `train/` have the inputs `x` too.
Where it has out-of-distribution rows, those and the test rows have a `centred_variance` of their logits, if the method
has covariances: without the level that all logits share, which changes no probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdl_bench.flatten import flat_rows
from bdl_bench.loaders import Loader, queries, rows
from bdl_bench.problem import Problem
from estimators import UncertaintyEstimator
from estimators.errors import DataError, TooLargeError, UnsupportedError
from estimators.prediction import Prediction
from estimators.pytrees import PyTree

__all__ = ["Arrays", "Predictor", "prefixed"]

Arrays = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Predictor:
    """A fitted estimator, and what predicts by it: its own `predict`, or that of its tuning."""

    problem: Problem
    estimator: UncertaintyEstimator
    predict: Callable[[PyTree], Prediction]

    def test(self) -> Arrays:
        """Predictions and targets of the test rows, in float64. Errors: DataError where one is not finite."""
        return self._on(self.problem.test)

    def beside_test(self) -> Arrays:
        """Those of validation, out-of-distribution and shifted rows, under their prefixes; and centred variances."""
        problem = self.problem
        arrays = self._centred()
        for name, loader in problem.sets().items():
            if name not in ("train", "test"):
                arrays |= prefixed(name, self._on(loader))
        if problem.band is not None:
            arrays |= prefixed("band", {"x": _inputs(problem.band)})
            arrays |= prefixed("train", {"x": _inputs(problem.train), "targets": _targets(problem.train)})
        return arrays

    def everywhere(self) -> Arrays:
        """Of all rows."""
        return self.test() | self.beside_test()

    def _on(self, loader: Loader) -> Arrays:
        parts: dict[str, list[Tensor]] = {}
        for query in queries(loader):
            for name, tensor in _fields(*flat_rows(self.predict(query.x), query.y, self.problem.likelihood)):
                parts.setdefault(name, []).append(tensor.detach())
        arrays = {name: _joined(pieces) for name, pieces in parts.items()}
        _refuse_non_finite(arrays)
        return arrays

    def _centred(self) -> Arrays:
        """The variances of f − mean f of test and out-of-distribution rows; none where the method has none."""
        problem = self.problem
        if problem.likelihood.kind != "classification" or not problem.ood:
            return {}
        if self.estimator.network_.shaped_outputs(next(queries(problem.test)).x).ndim > 2:
            return {}
        sets = {"": problem.test}
        sets |= {f"{name}/": loader for name, loader in problem.sets().items() if name.startswith("ood/")}
        try:
            return {f"{prefix}centred_variance": self._centred_on(loader) for prefix, loader in sets.items()}
        except (TooLargeError, UnsupportedError):
            return {}

    def _centred_on(self, loader: Loader) -> NDArray[np.float64]:
        return _joined([self.estimator.variance(query.x, of=_centre) for query in queries(loader)])


def prefixed(name: str, arrays: Arrays) -> Arrays:
    """The same arrays under `<name>/`."""
    return {f"{name}/{key}": array for key, array in arrays.items()}


def _centre(f: Tensor) -> Tensor:
    return f - f.mean(-1, keepdim=True)


def _joined(pieces: list[Tensor]) -> NDArray[np.float64]:
    array: NDArray[np.float64] = torch.cat(pieces).detach().cpu().double().numpy()
    return array


def _inputs(loader: Loader) -> NDArray[np.float64]:
    return np.concatenate([query.x.cpu().double().numpy() for query in queries(loader)])


def _targets(loader: Loader) -> NDArray[np.float64]:
    return np.concatenate([batch.y.cpu().double().numpy() for batch in rows(loader)])


def _fields(prediction: Prediction, targets: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    for name in ("mean", "epistemic_variance", "total_variance", "probs", "log_probs", "log_odds"):
        tensor = getattr(prediction, name)
        if tensor is not None:
            yield name, tensor
    if targets is not None:
        yield "targets", targets


def _refuse_non_finite(arrays: Arrays) -> None:
    for name, array in arrays.items():
        bad = int(np.size(array) - np.isfinite(array).sum())
        if bad:
            raise DataError(
                "finite predictions",
                received=f"{bad} NaN or Inf among {np.size(array)} values of {name}",
                remedy="look at the scale of the data, and at prior_precision.",
            )
