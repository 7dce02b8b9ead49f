"""Custom methods: plain classes with `fit`, and `variance` or `score`, wrapped as estimators."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from bdl_bench.problem.problem import Problem
from estimators import Prediction, UncertaintyEstimator
from estimators.errors import DataError, OptionError
from estimators.numerics.pytrees import PyTree, n_rows
from estimators.objective.objective import Objective
from estimators.persistence.weight_checksum import check_unchanged, weight_checksum

__all__ = ["NOT_REPORTED", "CustomEstimator", "as_estimator", "learned_values"]

NOT_REPORTED = "not reported"
"""Stands in a record for a number that a method does not report."""


def as_estimator(method: object, problem: Problem) -> UncertaintyEstimator:
    """Return an estimator unchanged, and any object with `fit(train_loader)` and `variance(x)` or `score(x)` wrapped.

    Raises OptionError for an object without them.
    """
    if isinstance(method, UncertaintyEstimator):
        return method
    missing = [] if callable(getattr(method, "fit", None)) else ["fit"]
    if not _answers(method):
        missing.append("variance")
    if missing:
        raise OptionError(
            "a method with fit(train_loader) and variance(x), or score(x) without a variance",
            received=f"a {type(method).__name__} without {' and '.join(missing)}",
            remedy="write them, or subclass estimators.UncertaintyEstimator.",
        )
    return CustomEstimator(method, problem)


class CustomEstimator(UncertaintyEstimator):
    """A user's object with `fit(train_loader)`, and `variance(x)` or `score(x)`, as an estimator.

    `variance(x)` returns the epistemic variance of the outputs at x as a tensor or array (M, C), or (M,) for one
    output. `score(x)` returns an out-of-distribution score of each row, (M,). Without `variance` the variance is 0.

    Three more members are optional: `covariance(x)`, which returns (M, C, C); `predict(x)`, which returns a
    `Prediction` that replaces the one from the problem's network and the variance; and `passes_` after the fit. `fit`
    may return itself, another fitted object, or None. Missing numbers are recorded as "not reported".

    Args:
        method: the object.
        problem: that it is fitted on.

    Example:
        >>> class Constant:
        ...     def fit(self, train_loader): ...
        ...     def variance(self, x):
        ...         return torch.ones(len(x), 1)
        >>> estimator = as_estimator(Constant(), problem).fit(problem.train)  # doctest: +SKIP
    """

    def __init__(self, method: Any, problem: Problem) -> None:  # noqa: ANN401
        super().__init__(problem.model, problem.likelihood, prior_precision=problem.prior_precision)
        self.method, self.problem = method, problem
        self.method_report_: dict[str, Any] = {}

    @property
    def retrains(self) -> bool:  # type: ignore[override]
        """Whether a fit trains networks, if the method has such an attribute; else False."""
        return bool(getattr(self.method, "retrains", False))

    @property
    def counts_passes(self) -> bool:  # type: ignore[override]
        """Whether the method counts its passes."""
        return isinstance(getattr(self.method, "passes_", None), (int, float))

    @property
    def passes_(self) -> float:
        """The passes that the method counted; 0 if it does not count them, which records show as not reported."""
        return float(self.method.passes_) if self.counts_passes else 0.0

    def fit(
        self,
        train_loader: Iterable[Any],
        *,
        val_loader: Iterable[Any] | None = None,
        progress_bar: bool = False,
        checkpoint: str | Path | None = None,
        accelerator: Any = None,  # noqa: ANN401
    ) -> Self:
        """Check the data as every estimator does, and fit the method on the same loader."""
        self._loader = train_loader
        return super().fit(
            train_loader,
            val_loader=val_loader,
            progress_bar=progress_bar,
            checkpoint=checkpoint,
            accelerator=accelerator,
        )

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        before = weight_checksum(self.model)
        fitted = self.method.fit(self._loader)
        check_unchanged(self.model, before)  # methods share the network
        if _answers(fitted):
            self.method = fitted
        passes = {} if self.counts_passes else {"passes": NOT_REPORTED}
        self.method_report_ = passes | learned_values(self.method)

    def predict_uncalibrated(self, x: PyTree, *, link_approx: str = "probit", n_samples: int = 100) -> Prediction:
        """Return the prediction of the method's own `predict`, or that of the network's outputs and the variance."""
        if not callable(getattr(self.method, "predict", None)):
            return super().predict_uncalibrated(x, link_approx=link_approx, n_samples=n_samples)
        made = self.method.predict(x)
        if not isinstance(made, Prediction):
            raise DataError(
                f"an estimators.Prediction from {self._name}.predict",
                received=f"a {type(made).__name__}",
                remedy="likelihood.predict(mean, variance, None) makes one; without predict, the network's outputs and "
                "variance(x) are used.",
            )
        return made

    def _score(self, x: PyTree) -> Tensor:
        if not _scores_rows(self.method):
            return super()._score(x)
        scores = self._to_tensor(self.method.score(x), self.network_.shaped_outputs(x))
        self._check_shape("score", scores, torch.Size([n_rows(x)]))
        return scores

    def _variance(self, x: PyTree) -> Tensor:
        f = self.network_.shaped_outputs(x)
        if not callable(getattr(self.method, "variance", None)):
            return torch.zeros_like(f).flatten(1)
        variance = self._to_tensor(self.method.variance(x), f)
        if variance.shape == f.shape[:1] and f[0].numel() == 1:
            variance = variance.reshape(f.shape)
        self._check_shape("variance", variance, f.shape)
        if bool((variance < 0).any()):
            raise DataError(
                f"a variance >= 0 from {self._name}.variance",
                received=f"a minimum of {float(variance.min()):.3g}",
                remedy="return squared standard deviations.",
            )
        return variance.flatten(1)

    def _covariance(self, x: PyTree) -> Tensor:
        if not callable(getattr(self.method, "covariance", None)):
            return super()._covariance(x)
        f = self.network_.outputs(x)
        covariance = self._to_tensor(self.method.covariance(x), f)
        self._check_shape("covariance", covariance, torch.Size([*f.shape, f.shape[1]]))
        return covariance

    def _to_tensor(self, values: object, f: Tensor) -> Tensor:
        try:
            return torch.as_tensor(values).detach().to(f)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"a tensor or an array of numbers from {self._name}",
                received=f"a {type(values).__name__}",
                remedy="return a tensor of the shape of the outputs.",
            ) from error

    def _check_shape(self, what: str, values: Tensor, expected: torch.Size) -> None:
        if values.shape != expected:
            raise DataError(
                f"a {what} of shape {tuple(expected)} from {self._name}.{what}",
                received=f"shape {tuple(values.shape)}",
                remedy="return one number per output and row; nothing is broadcast.",
            )
        bad = int(values.numel() - torch.isfinite(values).sum())
        if bad:
            raise DataError(
                f"a finite {what} from {self._name}.{what}",
                received=f"{bad} NaN or Inf among {values.numel()} values",
                remedy="check the method; a NaN is not replaced.",
            )

    @property
    def _name(self) -> str:
        return type(self.method).__name__


def _answers(method: object) -> bool:
    """Return whether an object has a variance, or a score of rows."""
    return callable(getattr(method, "variance", None)) or _scores_rows(method)


def _scores_rows(method: object) -> bool:
    """Return whether an object has `score(x)`. That of scikit-learn, `score(X, y)`, is another one."""
    score = getattr(method, "score", None)
    if not callable(score):
        return False
    try:
        inspect.signature(score).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def learned_values(fitted: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the learned attributes of a fitted object, whose names end with an underscore, and its `fit_report_`."""
    report = getattr(fitted, "fit_report_", None) or {}
    if dataclasses.is_dataclass(report) and not isinstance(report, type):
        report = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    named = dict(report) if isinstance(report, Mapping) else {"report": str(report)}
    attributes = getattr(fitted, "__dict__", {})
    learned = {name: value for name, value in attributes.items() if name.endswith("_") and name[0] != "_"}
    learned.pop("fit_report_", None)
    return {**learned, **named}
