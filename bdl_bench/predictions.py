"""What a fitted method says of every row of a problem, as named arrays: those of a record.

Test rows have plain names: `mean`, `epistemic_variance`, `total_variance` or `probs`, `targets`. Others have a prefix:
`validation/`, `ood/<set>/`, `shift/<set>/`; and what the tuned method says of all of them is under `tuned/` once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdl_bench.problem import Loader, Problem
from estimators.batch import split_batch
from estimators.errors import DataError
from estimators.prediction import Prediction
from estimators.pytrees import PyTree

__all__ = ["Arrays", "beside_test", "predicted", "prefixed"]

Arrays = dict[str, NDArray[np.float64]]
Predict = Callable[[PyTree], Prediction]


def predicted(predict: Predict, loader: Loader) -> Arrays:
    """Predictions and targets of every row of a loader, in float64. Errors: DataError where one is not finite."""
    parts: dict[str, list[Tensor]] = {}
    for item in loader:
        batch = split_batch(item)
        for name, tensor in _fields(predict(batch.x), batch.y):
            parts.setdefault(name, []).append(tensor.detach())
    arrays = {name: torch.cat(pieces).cpu().double().numpy() for name, pieces in parts.items()}
    _refuse_non_finite(arrays)
    return arrays


def beside_test(predict: Predict, problem: Problem) -> Arrays:
    """The same for validation rows, out-of-distribution rows and shifted rows, under their prefixes."""
    loaders = {"validation": problem.validation}
    loaders |= {f"ood/{name}": loader for name, loader in problem.ood.items()}
    loaders |= {f"shift/{name}": loader for name, loader in problem.shifts.items()}
    arrays: Arrays = {}
    for name, loader in loaders.items():
        arrays |= prefixed(name, predicted(predict, loader))
    return arrays


def prefixed(name: str, arrays: Arrays) -> Arrays:
    """The same arrays under `<name>/`."""
    return {f"{name}/{key}": array for key, array in arrays.items()}


def _fields(prediction: Prediction, targets: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name in ("mean", "epistemic_variance", "total_variance", "probs"):
        tensor = getattr(prediction, name)
        if tensor is not None:
            yield name, tensor
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
