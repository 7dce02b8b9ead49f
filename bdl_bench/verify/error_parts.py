"""Parts of the error of an approximation: variances in a sequence, each of which changes one thing.

    exact Hessian → GGN → K draws, solved → K draws, refitted at λ → K draws, refitted by minibatches at λ
             curvature gap  Monte Carlo      λ bias                  solver

All use the same draws. The structure gap, from the GGN of all weights to that of the last layer, stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdl_bench.verify.case import VerificationCase, names_of
from bdl_bench.verify.lambda_sweep import relative_error
from estimators import FineTune, LinearResponse, NewtonRefit, PosteriorDraws, RegVar
from estimators.errors import EstimatorError
from estimators.models.last_linear import last_linear_names
from estimators.models.subsets import SubsetSpec
from estimators.regvar.solvers import Solver

__all__ = ["SINGULAR", "ErrorPart", "error_parts_of"]

SINGULAR = 5e-10
"""Ratio of eigenvalues below which A counts as singular in float64."""
N_DRAWS = 16
"""Posterior draws, as in the comparison."""

Variance = Tensor | str  # a variance (M, C), or why there is none


@dataclass(frozen=True)
class ErrorPart:
    """The effect of one change on the variance.

    Args:
        name: of the part.
        change: what is changed, in words.
        error: max |after − before| / max |before|; None if there is none.
        mean_ratio: mean of after / before over queries and outputs, in which noise averages out and bias does not.
        note: why there is no error.
    """

    name: str
    change: str
    error: float | None
    mean_ratio: float | None = None
    note: str = ""


def error_parts_of(
    case: VerificationCase, subset: SubsetSpec, names: list[str], *, n_draws: int = N_DRAWS, seed: int = 0
) -> list[ErrorPart]:
    """Return the parts of the error for the weights `subset`, named `names` in the model, at the queries."""
    draws = _Draws(case, subset, PosteriorDraws(n_draws, seed=seed, variance_estimate="monte_carlo"))
    ggn = _exact(case, names, "ggn")
    solved = draws.variance(LinearResponse(tol=1e-10))
    tuned = draws.variance(FineTune())
    at = "" if draws.lam is None else f" at λ = {draws.lam:.2g}"
    refitted = tuned if draws.lam is None else draws.variance(NewtonRefit(draws.lam, "forward"))
    return [
        _part("curvature gap", "exact Hessian → GGN", _hessian_variance(case, names), ggn),
        _part("Monte Carlo", f"GGN → {n_draws} posterior draws, solved", ggn, solved),
        _part("λ bias", f"draws solved → refitted to high precision{at}", solved, refitted),
        _part("solver", f"refitted to high precision → by minibatches{at}", refitted, tuned),
        _part("together", f"GGN → {n_draws} posterior draws, refitted by minibatches{at}", ggn, tuned),
        _structure_gap(case, names, ggn),
    ]


@dataclass
class _Draws:
    """The variance of the same posterior draws by different solvers; `lam` is the λ that the last refit chose."""

    case: VerificationCase
    subset: SubsetSpec
    regularizer: PosteriorDraws
    lam: float | None = None

    def variance(self, solver: Solver) -> Variance:
        case = self.case
        estimator = RegVar(
            case.model,
            case.likelihood,
            prior_precision=case.prior_precision,
            subset_of_weights=self.subset,
            regularizer=self.regularizer,
            solver=solver,
        )
        try:
            found = estimator.fit(case.batches).variance(case.queries)
        except EstimatorError as error:
            return f"{type(error).__name__}: {error.received}"
        report = estimator.fit_report_.solver
        self.lam = None if report is None else report.lam
        return found


def _hessian_variance(case: VerificationCase, names: list[str]) -> Variance:
    reference = case.reference(names)
    eigenvalues = torch.linalg.eigvalsh(reference.precision("hessian"))
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    if smallest <= SINGULAR * largest:
        return f"no positive definite Hessian here: smallest eigenvalue {smallest:.2g}, largest {largest:.2g}"
    return _exact(case, names, "hessian")


def _structure_gap(case: VerificationCase, names: list[str], ggn: Tensor) -> ErrorPart:
    """Return the change from all weights to the chosen ones, or to the last layer if all are chosen."""
    everything = names_of(case.model)
    if set(names) != set(everything):
        whole = _exact(case, everything, "ggn")
        return _part("structure gap", "GGN of all weights → of the chosen ones", whole, ggn)
    return _part("structure gap", "GGN of all weights → of the last layer", ggn, _last_layer_variance(case))


def _last_layer_variance(case: VerificationCase) -> Variance:
    try:
        names = last_linear_names(case.model, case.batches[0][0])
    except EstimatorError as error:
        return f"{type(error).__name__}: {error.received}"
    return _exact(case, names, "ggn")


def _exact(case: VerificationCase, names: list[str], curvature: str) -> Tensor:
    """Return the variance of the reference over these parameters, (M, C)."""
    return case.reference(names).covariance(case.queries, curvature).diagonal(dim1=1, dim2=2)


def _part(name: str, change: str, before: Variance, after: Variance) -> ErrorPart:
    for end in (before, after):
        if isinstance(end, str):
            return ErrorPart(name, change, None, note=end)
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    return ErrorPart(name, change, relative_error(after, before), float((after / before).mean()))
