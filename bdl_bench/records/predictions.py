"""Predictions of a fitted method for every row of a problem, as the named arrays of a record.

Arrays of the test rows have plain names: `mean`, `epistemic_variance`, `total_variance` or `probs`, and `targets`. With
`probs` there are `log_probs` of classes, or `log_odds` of binary outputs. Other sets have a prefix: `validation/`,
`ood/<set>/`, `shift/<set>/`. The predictions of the tuned method repeat all of them under `tuned/`. A set whose loader
has no targets has no `targets` array. If the problem has rows for the plot of predictive bands, these and the training
rows also have their inputs `x`. If it has out-of-distribution rows, these and the test rows have the `centred_variance`
of their logits: the variance without the shift that is common to all logits, which changes no probability. A method
whose chains make two predictions has `even_mean`, `odd_mean` and so on (`chain_halves.py`). A method
with function samples or covariances has `joint_nll`, `mutual_information` and `energy_score` (`sample_scores.py`).

Predictions, targets and variances of a regression are in the original unit of the target (`target_units.py`).

Every set has `row_id`, a digest of the inputs and the target of each row. Arrays of two records are paired by it and
never by position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdl_bench.problem.flatten import flat_rows, row_of_each
from bdl_bench.problem.kept_rows import CheckedRows, KeptRows
from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import Query, queries
from bdl_bench.problem.row_identity import ids_of, position_ids
from bdl_bench.records.chain_halves import HalfPredictor, half_fields
from bdl_bench.records.sample_scores import SampleScores
from bdl_bench.records.target_units import in_target_units
from estimators import UncertaintyEstimator
from estimators.calibration.calibration import Calibration
from estimators.errors import DataError, TooLargeError, UnsupportedError
from estimators.likelihoods.prediction import Prediction
from estimators.numerics.pytrees import PyTree, split_rows

__all__ = ["ROW_ID", "Arrays", "Predictor", "check_arrays", "prefixed"]

Arrays = dict[str, NDArray[Any]]
ROW_ID = "row_id"
_MAY_BE_INFINITE = ("log_probs", "log_odds", "joint_nll")  # a class may have probability 0


@dataclass(frozen=True)
class Predictor:
    """Computes the arrays of a record.

    Args:
        problem: with the rows.
        estimator: fitted.
        predict: the prediction of the fitted estimator, or the calibrated one, in the units of the network's outputs.
        calibration: that of `predict`; None if it is not calibrated.
    """

    problem: Problem
    estimator: UncertaintyEstimator
    predict: Callable[[PyTree], Prediction]
    calibration: Calibration | None = None

    def test(self) -> Arrays:
        """Return predictions and targets of the test rows, in float64; raise DataError if one is not finite."""
        return in_target_units(self._on("test"), self.problem.likelihood)

    def other_sets(self) -> Arrays:
        """Return the arrays of all sets other than the test rows under their prefixes, and centred variances."""
        problem = self.problem
        arrays: Arrays = {}
        for name in problem.sets():
            if name not in ("train", "test"):
                arrays |= prefixed(name, self._on(name))
        arrays |= self._centred()
        arrays |= self._from_samples()
        arrays |= self._halves()
        if problem.plot_grid is not None:
            grid = self._kept("plot_grid")
            arrays |= prefixed("plot_grid", {"x": _in_order(grid, _inputs(list(queries(grid, problem.layout))))})
            train = list(queries(problem.train, problem.layout))
            targets = [query.y for query in train if query.y is not None]
            arrays |= prefixed("train", {"x": _inputs(train), "targets": _joined(targets)})
        return in_target_units(arrays, problem.likelihood)

    def all_sets(self) -> Arrays:
        """Return the arrays of all sets."""
        return self.test() | self.other_sets()

    def _kept(self, name: str) -> KeptRows | CheckedRows:
        kept = self.problem.kept().sets()[name]
        assert isinstance(kept, (KeptRows, CheckedRows))
        return kept

    def _on(self, name: str) -> Arrays:
        kept, likelihood = self._kept(name), self.problem.likelihood
        parts: dict[str, list[Tensor]] = {}
        rows: list[Tensor] = []
        start = 0
        for query in queries(kept, self.problem.layout):
            prediction = self._predicted(kept, query, start)
            for key, tensor in _fields(*flat_rows(prediction, query.y, likelihood)):
                parts.setdefault(key, []).append(tensor.detach())
            of_row = row_of_each(prediction, query.y, likelihood)
            rows.append(start + (torch.arange(len(query)) if of_row is None else of_row.cpu()))
            start += len(query)
        arrays: Arrays = {key: _joined(tensors) for key, tensors in parts.items()}
        row_of = torch.cat(rows).numpy()
        check_arrays(arrays, lambda entry: kept.describe(int(row_of[entry])))
        ids = ids_of(kept.digests)
        arrays[ROW_ID] = ids if np.array_equal(row_of, np.arange(len(ids))) else position_ids(ids, row_of)
        return {key: _in_order(kept, array, row_of) for key, array in arrays.items()}

    def _predicted(self, kept: KeptRows | CheckedRows, query: Query, start: int) -> Prediction:
        """Return the prediction for a batch; raise DataError with the name of the set and the first invalid row."""
        try:
            return self.predict(query.x)
        except DataError as error:
            row = next((i for i, x in enumerate(split_rows(query.x, 1)) if self._raises(x)), None)
            location = f"{kept.name} loader" if row is None else kept.describe(start + row)
            raise type(error)(error.expected, received=f"{error.received} ({location})", remedy=error.remedy) from error

    def _raises(self, x: PyTree) -> bool:
        try:
            self.predict(x)
        except DataError:
            return True
        return False

    def _centred(self) -> Arrays:
        """Return the variances of f − mean f of test and out-of-distribution rows, if the method has covariances."""
        problem = self.problem
        if problem.likelihood.kind != "classification" or not problem.ood:
            return {}
        first = next(queries(self._kept("test"), problem.layout))
        if self.estimator.network_.shaped_outputs(first.x).ndim > 2:
            return {}
        sets = {"": "test"} | {f"{name}/": name for name in problem.sets() if name.startswith("ood/")}
        try:
            return {f"{prefix}centred_variance": self._centred_on(self._kept(name)) for prefix, name in sets.items()}
        except (TooLargeError, UnsupportedError):
            return {}

    def _from_samples(self) -> Arrays:
        """Return the scores of test and out-of-distribution rows that need function samples or covariances."""
        scores = SampleScores(self.estimator, self.predict, self.calibration)
        arrays: Arrays = {}
        for name in self.problem.sets():
            if name != "test" and not name.startswith("ood/"):
                continue
            kept = self._kept(name)
            found = [scores.of_batch(q, joint=name == "test") for q in queries(kept, self.problem.layout)]
            for key in found[0]:
                if all(key in part for part in found):
                    array = _in_order(kept, np.concatenate([part[key] for part in found]))
                    arrays[key if name == "test" else f"{name}/{key}"] = array
        return arrays

    def _halves(self) -> Arrays:
        """Return the predictions by both halves of the chains of a sampled posterior, without calibration."""
        estimator = self.estimator
        arrays: Arrays = {}
        if not isinstance(estimator, HalfPredictor) or self.calibration is not None:
            return {}
        for name in self.problem.sets():
            if name != "test" and not name.startswith(("ood/", "shift/")):
                continue
            kept = self._kept(name)
            found = [half_fields(estimator, q, self.problem.likelihood) for q in queries(kept, self.problem.layout)]
            halves = {key: _joined([part[key] for part in found]) for key in found[0]}
            if len(next(iter(halves.values()))) == len(kept.digests):  # one row each
                halves = {key: _in_order(kept, array) for key, array in halves.items()}
                arrays |= halves if name == "test" else prefixed(name, halves)
        return arrays

    def _centred_on(self, kept: KeptRows | CheckedRows) -> NDArray[np.float64]:
        batches = queries(kept, self.problem.layout)
        return _in_order(kept, _joined([self.estimator.variance(query.x, of=_centre) for query in batches]))


def prefixed(name: str, arrays: Arrays) -> Arrays:
    """Return arrays under the names `<name>/...`."""
    return {f"{name}/{key}": array for key, array in arrays.items()}


def _in_order(
    kept: KeptRows | CheckedRows, array: NDArray[Any], row_of: NDArray[np.int64] | None = None
) -> NDArray[Any]:
    """Return an array in the order of a record; `row_of` has the row of each entry if rows have several positions."""
    if kept.loader_order is None:
        return array
    if row_of is None or np.array_equal(row_of, np.arange(len(kept.loader_order))):
        return array[kept.loader_order]
    rank = np.empty(len(kept.loader_order), dtype=np.int64)
    rank[kept.loader_order] = np.arange(len(kept.loader_order))
    return array[np.argsort(rank[row_of], kind="stable")]


def _centre(f: Tensor) -> Tensor:
    return f - f.mean(-1, keepdim=True)


def _joined(parts: list[Tensor]) -> NDArray[np.float64]:
    array: NDArray[np.float64] = torch.cat(parts).detach().cpu().double().numpy()
    return array


def _inputs(batches: list[Query]) -> NDArray[np.float64]:
    return _joined([batch.x for batch in batches])


def _fields(prediction: Prediction, targets: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    for name in ("mean", "epistemic_variance", "total_variance", "probs", "log_probs", "log_odds"):
        tensor = getattr(prediction, name)
        if tensor is not None:
            yield name, tensor
    if targets is not None:
        yield "targets", targets


def check_arrays(arrays: Mapping[str, NDArray[Any]], describe: Callable[[int], str] = "row {}".format) -> None:
    """Raise DataError for NaN, for Inf but in log-probabilities, and for a total variance that is not positive.

    `describe` returns what a message says of the entry with an index.
    """
    for name, array in arrays.items():
        quantity = name.rpartition("/")[2]
        if array.dtype.kind != "f":
            continue
        bad = np.isnan(array) if quantity in _MAY_BE_INFINITE else ~np.isfinite(array)
        if bad.any():
            raise DataError(
                "finite predictions",
                received=f"{int(bad.sum())} NaN or Inf among {array.size} values of {name}, the first in "
                f"{describe(_row(bad))}",
                remedy="look at the variance of the method, at the scale of the data, and at prior_precision.",
            )
        if quantity == "total_variance" and bool((array <= 0).any()):
            raise DataError(
                "a positive total_variance, epistemic plus noise",
                received=f"{array.min():.3g} as the least of {name}, the first that is not positive in "
                f"{describe(_row(array <= 0))}",
                remedy="a method whose variance can be negative needs more draws or probes, or a larger noise.",
            )


def _row(bad: NDArray[np.bool_]) -> int:
    return int(np.argwhere(bad)[0, 0])
