"""Look at a trained network and its data before anything is fitted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
from estimators.models.network import structural_copy
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
"""Every check, in the order in which they are made."""
QUICK = ("forward", "overlap", "gradient", "targets")
"""Those that take a few passes over the data, whatever the network."""


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
    """What will go wrong, what will mislead, what will take how long: measured, before a fit.

    Model, likelihood, prior and subset as an estimator takes them. `validation` and `test` are held-out loaders;
    `weight_decay` is that of the training, or its optimizer. `checks` chooses among `CHECKS`: all of them take some
    hundred passes over the data, most of them in "spectrum"; `QUICK` some ten.

    Nothing is raised for a bad model or bad data: each is a finding of level "error". The model and the random state
    are left as they were. Errors: OptionError for a bad argument.
    """
    _check_names(checks)
    found = [weight_finding(model), mode_finding(model)]
    if found[0].level == "error":
        return Diagnosis((*found, _not_looked_at(checks)))
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
            return Diagnosis((*found, outcome, _not_looked_at(checks)))
        found.append(parameter_finding(model, outcome.theta.numel()))
        splits = _splits({"validation": validation, "test": test})
        subject = DiagnosticContext(model, outcome, splits.rows, weight_decay)
        found += splits.faults
        for name, check in CHECKS.items():
            if name in checks:
                found += _measured(name, check, subject)
    return Diagnosis(tuple(found), tuple(subject.costs))


def _check_names(checks: Collection[str]) -> None:
    unknown = [name for name in checks if name not in CHECKS]
    if unknown:
        raise OptionError(f"checks among {', '.join(CHECKS)}", received=repr(unknown[0]), remedy="leave checks out.")


def _not_looked_at(checks: Collection[str]) -> Finding:
    return Finding("the rest", "note", f"not looked at: {', '.join(checks)}", "the error above comes first.")


def _objective(estimator: MAP, train_loader: Iterable[Any]) -> Objective | Finding:
    """The objective, or the finding that model or data do not let it be made."""
    try:
        return estimator.fit(train_loader).objective_
    except OptionError:
        raise
    except EstimatorError as error:
        return _fault(_name_of(error), error)


def _name_of(error: EstimatorError) -> str:
    """The finding that says what `fit` refuses."""
    if isinstance(error, NonDeterministicError):
        return "determinism"
    if isinstance(error, DependentRowsError):
        return "independence of rows"
    return "training data" if isinstance(error, DataError) else "model"


def _fault(name: str, error: EstimatorError) -> Finding:
    return Finding(name, "error", error.received, f"expected {error.expected}: fit refuses.", error.remedy)


@dataclass(frozen=True)
class _Splits:
    """Held-out rows, and the sets that could not be read."""

    rows: dict[str, TrainingData]
    faults: list[Finding]


def _splits(loaders: Mapping[str, Iterable[Any] | None]) -> _Splits:
    splits = _Splits({}, [])
    for name, loader in loaders.items():
        if loader is None:
            continue
        try:
            splits.rows[name] = TrainingData.unchecked(loader, keep=True)
        except EstimatorError as error:
            splits.faults.append(_fault(f"{name} data", error))
    return splits


def _measured(
    name: str, check: Callable[[DiagnosticContext], Iterable[Finding]], subject: DiagnosticContext
) -> Iterator[Finding]:
    """The findings of a check; one that could not be made says so."""
    try:
        yield from check(subject)
    except (EstimatorError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        level: Level = "error" if isinstance(error, DataError) else "warning"
        meaning = "it is not known, then, whether all is well here."
        yield Finding(name, level, f"could not be measured: {type(error).__name__}: {reason}", meaning)
