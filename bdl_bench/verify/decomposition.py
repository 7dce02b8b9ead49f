"""Where the error of an approximation comes from: a chain of variances, each link changing one thing.

    exact Hessian → GGN → K draws, solved → K draws, refitted at λ → K draws, refitted by minibatches at λ
             curvature gap  Monte Carlo      λ bias                  solver

The draws are the same wherever there are some. Beside the chain stands the structure gap, GGN of all weights → of the
last layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdl_bench.verify.lambda_sweep import relative_error
from bdl_bench.verify.subject import VerificationCase, names_of
from estimators import FineTune, LinearResponse, NewtonRefit, PosteriorDraws, RegVar
from estimators.errors import EstimatorError
from estimators.models.last_linear import last_linear_names
from estimators.models.subsets import SubsetSpec
from estimators.regvar.solvers import Solver

__all__ = ["Link", "decompose"]

_SINGULAR = 5e-10

Variance = Tensor | str  # a variance (M, C), or why there is none


@dataclass(frozen=True)
class Link:
    """One step: error = max |after − before| / max |before|, None where `note` says why there is none.

    mean_ratio: the mean of after / before over queries and outputs, where a bias shows and noise averages out.
    """

    name: str
    change: str
    error: float | None
    mean_ratio: float | None = None
    note: str = ""


def decompose(
    subject: VerificationCase, subset: SubsetSpec, names: list[str], *, n_draws: int = 16, seed: int = 0
) -> list[Link]:
    """The links for the weights `subset`, called `names` in the model, at the subject's queries."""
    chain = _Chain(subject, subset, PosteriorDraws(n_draws, seed=seed, readout="draws"))
    ggn = _exact(subject, names, "ggn")
    solved = chain.variance(LinearResponse(tol=1e-10))
    tuned = chain.variance(FineTune())
    at = "" if chain.lam is None else f" at λ = {chain.lam:.2g}"
    refitted = tuned if chain.lam is None else chain.variance(NewtonRefit(chain.lam, "forward"))
    return [
        _link("curvature gap", "exact Hessian → GGN", _hessian_variance(subject, names), ggn),
        _link("Monte Carlo", f"GGN → {n_draws} posterior draws, solved", ggn, solved),
        _link("λ bias", f"draws solved → refitted to high precision{at}", solved, refitted),
        _link("solver", f"refitted to high precision → by minibatches{at}", refitted, tuned),
        _link("together", f"GGN → {n_draws} posterior draws, refitted by minibatches{at}", ggn, tuned),
        _structure_gap(subject, names, ggn),
    ]


@dataclass
class _Chain:
    """Posterior draws by one solver after another; `lam` is the λ that the last refit chose."""

    subject: VerificationCase
    subset: SubsetSpec
    regularizer: PosteriorDraws
    lam: float | None = None

    def variance(self, solver: Solver) -> Variance:
        subject = self.subject
        estimator = RegVar(
            subject.model,
            subject.likelihood,
            prior_precision=subject.prior_precision,
            subset_of_weights=self.subset,
            regularizer=self.regularizer,
            solver=solver,
        )
        try:
            found = estimator.fit(subject.batches).variance(subject.queries)
        except EstimatorError as error:
            return f"{type(error).__name__}: {error.received}"
        report = estimator.fit_report_.solver
        self.lam = None if report is None else report.lam
        return found


def _hessian_variance(subject: VerificationCase, names: list[str]) -> Variance:
    reference = subject.reference(names)
    eigenvalues = torch.linalg.eigvalsh(reference.precision("hessian"))
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    if smallest <= _SINGULAR * largest:
        return f"no positive definite Hessian here: smallest eigenvalue {smallest:.2g}, largest {largest:.2g}"
    return _exact(subject, names, "hessian")


def _structure_gap(subject: VerificationCase, names: list[str], ggn: Tensor) -> Link:
    """From all weights to the chosen ones, or to the last layer where all are chosen."""
    everything = names_of(subject.model)
    if set(names) != set(everything):
        whole = _exact(subject, everything, "ggn")
        return _link("structure gap", "GGN of all weights → of the chosen ones", whole, ggn)
    return _link("structure gap", "GGN of all weights → of the last layer", ggn, _last_layer_variance(subject))


def _last_layer_variance(subject: VerificationCase) -> Variance:
    try:
        names = last_linear_names(subject.model, subject.batches[0][0])
    except EstimatorError as error:
        return f"{type(error).__name__}: {error.received}"
    return _exact(subject, names, "ggn")


def _exact(subject: VerificationCase, names: list[str], curvature: str) -> Tensor:
    """The reference's variance over these parameters, (M, C)."""
    return subject.reference(names).covariance(subject.queries, curvature).diagonal(dim1=1, dim2=2)


def _link(name: str, change: str, before: Variance, after: Variance) -> Link:
    for end in (before, after):
        if isinstance(end, str):
            return Link(name, change, None, note=end)
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    return Link(name, change, relative_error(after, before), float((after / before).mean()))
