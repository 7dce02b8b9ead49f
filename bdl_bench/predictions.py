"""What a fitted method says of every row of a problem, as named arrays: those of a record.

Test rows have plain names: `mean`, `epistemic_variance`, `total_variance` or `probs` with `log_probs` (classification)
or `log_odds` (binary), `targets`. Others have a prefix:
`validation/`, `ood/<set>/`, `shift/<set>/`; and what the tuned method says of all of them is under `tuned/` once more.
A set whose loader knows no targets has none. Where a problem has a band, `band/` and `train/` have the inputs `x` too.
Where it has out-of-distribution rows, those and the test rows have a `centred_variance` of their logits, if the method
has covariances: without the level that all logits share, which changes no probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdl_bench.flatten import flat_rows, kept_rows
from bdl_bench.loader_checks import located
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
        return self._on("test", self.problem.test)

    def beside_test(self) -> Arrays:
        """Those of validation, out-of-distribution and shifted rows, under their prefixes; and centred variances."""
        problem = self.problem
        arrays = self._centred()
        for name, loader in problem.sets().items():
            if name not in ("train", "test"):
                arrays |= prefixed(name, self._on(_spoken(name), loader))
        if problem.band is not None:
            arrays |= prefixed("band", {"x": _inputs(problem.band)})
            arrays |= prefixed("train", {"x": _inputs(problem.train), "targets": _targets(problem.train)})
        return arrays

    def everywhere(self) -> Arrays:
        """Of all rows."""
        return self.test() | self.beside_test()

    def _on(self, name: str, loader: Loader) -> Arrays:
        parts: dict[str, list[Tensor]] = {}
        for batch, query in enumerate(queries(loader)):
            with located(name, batch):
                fields = dict(_fields(*flat_rows(self.predict(query.x), query.y, self.problem.likelihood)))
                _check_fields(fields, self.problem.likelihood.kind)
            for field, tensor in fields.items():
                parts.setdefault(field, []).append(tensor.detach())
        return {field: _joined(pieces) for field, pieces in parts.items()}

    def _centred(self) -> Arrays:
        """The variances of f − mean f of test and out-of-distribution rows; none where the method has none."""
        problem = self.problem
        if problem.likelihood.kind != "classification" or not problem.ood:
            return {}
        if self.estimator.network_.shaped_outputs(next(queries(problem.test)).x).ndim > 2:
            return {}
        sets = {"test": problem.test}
        sets |= {name: loader for name, loader in problem.sets().items() if name.startswith("ood/")}
        try:
            found = {name: self._centred_on(name, loader) for name, loader in sets.items()}
            return {("" if name == "test" else f"{name}/") + "centred_variance": v for name, v in found.items()}
        except (TooLargeError, UnsupportedError):
            return {}

    def _centred_on(self, name: str, loader: Loader) -> NDArray[np.float64]:
        pieces = []
        for batch, query in enumerate(queries(loader)):
            with located(_spoken(name), batch):
                variance = self.estimator.variance(query.x, of=_centre)
                _check_fields({"centred_variance": variance}, self.problem.likelihood.kind)
            pieces.append(variance[kept_rows(query.y, len(variance), self.problem.likelihood)])
        return _joined(pieces)


def prefixed(name: str, arrays: Arrays) -> Arrays:
    """The same arrays under `<name>/`."""
    return {f"{name}/{key}": array for key, array in arrays.items()}


def _spoken(name: str) -> str:
    """Of a set in messages: "ood far" of "ood/far"."""
    return name.replace("/", " ", 1)


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


def _check_fields(fields: Mapping[str, Tensor], kind: str) -> None:
    """DataError for NaN or Inf, and for a total variance that is not positive: no metric is computed of those."""
    for name, tensor in fields.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            raise DataError(
                "finite predictions",
                received=f"{int(bad.sum())} NaN or Inf among {tensor.numel()} values of {name}, the first in row "
                f"{int(bad.nonzero()[0, 0])} of the batch",
                remedy="look at the scale of the data, and at prior_precision.",
            )
    if kind == "regression" and "total_variance" in fields and not bool((fields["total_variance"] > 0).all()):
        bad = fields["total_variance"] <= 0
        raise DataError(
            "a positive total_variance, epistemic and noise",
            received=f"{float(fields['total_variance'].min()):.3g} as the smallest, the first that is not positive in "
            f"row {int(bad.nonzero()[0, 0])} of the batch",
            remedy="a method whose variance can be negative needs more draws or probes, or a larger noise.",
        )
