"""`diagnose`: check a trained network and its data before a fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from estimators.baselines.map import MAP
from estimators.data.training_data import TrainingData
from estimators.diagnostics.context import Check, DiagnosticContext
from estimators.diagnostics.costs import cost_finding
from estimators.diagnostics.diagnosis import Diagnosis
from estimators.diagnostics.findings import Finding, Level
from estimators.diagnostics.model_mode import forward_findings, mode_finding, parameter_finding, weight_finding
from estimators.diagnostics.overlap import overlap_findings
from estimators.diagnostics.spectrum import spectrum_findings
from estimators.diagnostics.stationarity import gradient_finding, newton_finding
from estimators.diagnostics.targets import target_findings
from estimators.diagnostics.weight_decay import decay_finding
from estimators.errors import DataError, DependentRowsError, EstimatorError, NonDeterministicError, OptionError
from estimators.likelihoods import Likelihood
from estimators.models.structural_copy import structural_copy
from estimators.models.subsets import SubsetSpec
from estimators.objective.objective import Objective
from estimators.runtime.rng import preserved_random_state

__all__ = ["CHECKS", "QUICK", "diagnose"]

CHECKS: dict[str, Check] = {
    "forward": forward_findings,
    "overlap": overlap_findings,
    "gradient": gradient_finding,
    "newton": newton_finding,
    "spectrum": spectrum_findings,
    "decay": decay_finding,
    "targets": target_findings,
    "cost": cost_finding,
}
"""All checks, in the order in which they run."""
QUICK = ("forward", "overlap", "gradient", "targets")
"""The checks that need only a few passes over the data."""


def diagnose(
    model: nn.Module,
    likelihood: str | Likelihood,
    train_loader: Iterable[Any],
    *,
    prior_precision: float | Mapping[str, float] = 1.0,
    prior_mean: float = 0.0,
    subset_of_weights: SubsetSpec = "all",
    validation: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    weight_decay: float | torch.optim.Optimizer | None = None,
    checks: Collection[str] = tuple(CHECKS),
) -> Diagnosis:
    """Check a trained network and its data before a fit: errors, misleading numbers, and the cost of every method.

    Problems of model or data do not raise: each is a finding of level "error". The model and the random state do not
    change.

    Args:
        model: the trained network.
        likelihood: as `UncertaintyEstimator`.
        train_loader: the training data, a re-iterable of (x, y) or of dicts with "labels".
        prior_precision: as `UncertaintyEstimator`.
        prior_mean: as `UncertaintyEstimator`.
        subset_of_weights: as `UncertaintyEstimator`.
        validation: a loader of validation rows, or None.
        test: a loader of test rows, or None.
        weight_decay: the weight decay of the training, or its optimizer.
        checks: names of checks in `CHECKS`. All of them need about a hundred passes over the data, most of them for
            "spectrum"; `QUICK` needs about ten.

    Returns:
        The findings and the costs.

    Raises:
        OptionError: for an invalid argument.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> rows = [(torch.randn(20, 3), torch.randn(20, 1))]
        >>> diagnosis = diagnose(nn.Linear(3, 1), "regression", rows, checks=["overlap"])
        >>> diagnosis["repeated rows"].level
        'ok'
    """
    _check_names(checks)
    found = [weight_finding(model), mode_finding(model)]
    if found[0].level == "error":
        return Diagnosis((*found, _skipped_finding(checks)))
    with preserved_random_state():
        estimator = MAP(
            structural_copy(model).eval(),
            likelihood,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            subset_of_weights=subset_of_weights,
        )
        outcome = _objective(estimator, train_loader)
        if isinstance(outcome, Finding):
            return Diagnosis((*found, outcome, _skipped_finding(checks)))
        found.append(parameter_finding(model, outcome.theta.numel()))
        context = DiagnosticContext(model, outcome, weight_decay=weight_decay)
        for name, loader in {"validation": validation, "test": test}.items():
            try:
                if loader is not None:
                    context.splits[name] = TrainingData.unchecked(loader, keep=True)
            except EstimatorError as error:
                found.append(_fault(f"{name} data", error))
        for name, check in CHECKS.items():
            if name in checks:
                found += _run_check(name, check, context)
    return Diagnosis(tuple(found), tuple(context.costs))


def _check_names(checks: Collection[str]) -> None:
    unknown = [name for name in checks if name not in CHECKS]
    if unknown:
        raise OptionError(f"checks among {', '.join(CHECKS)}", received=repr(unknown[0]), remedy="leave checks out.")


def _skipped_finding(checks: Collection[str]) -> Finding:
    return Finding("the rest", "note", f"not checked: {', '.join(checks)}", "correct the error above first.")


def _objective(estimator: MAP, train_loader: Iterable[Any]) -> Objective | Finding:
    """Return the objective, or a finding if model or data are invalid."""
    try:
        return estimator.fit(train_loader).objective_
    except OptionError:
        raise
    except EstimatorError as error:
        return _fault(_name_of(error), error)


def _name_of(error: EstimatorError) -> str:
    """Return the name of the finding for an error of `fit`."""
    if isinstance(error, NonDeterministicError):
        return "determinism"
    if isinstance(error, DependentRowsError):
        return "independence of rows"
    return "training data" if isinstance(error, DataError) else "model"


def _fault(name: str, error: EstimatorError) -> Finding:
    return Finding(name, "error", error.received, f"expected {error.expected}: fit raises.", error.remedy)


def _run_check(
    name: str, check: Callable[[DiagnosticContext], Iterable[Finding]], context: DiagnosticContext
) -> Iterator[Finding]:
    """Yield the findings of a check, or one that says why the check could not run."""
    try:
        yield from check(context)
    except (EstimatorError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        level: Level = "error" if isinstance(error, DataError) else "warning"
        meaning = "whether there is a problem is not known."
        yield Finding(name, level, f"could not be measured: {type(error).__name__}: {reason}", meaning)
