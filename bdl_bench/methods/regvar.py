"""RegVar with its regularizers and solvers, and the published amortised form."""

from __future__ import annotations

from collections.abc import Callable

from bdl_bench.methods.registry import PRIOR, Build, Method, around
from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import queries
from estimators import (
    FineTune,
    LinearResponse,
    MeanAbsolute,
    ParameterProbes,
    Pointwise,
    PosteriorDraws,
    RegVar,
    UncertaintyEstimator,
)
from estimators.errors import UnsupportedError
from estimators.regvar.regularizers import Regularizer
from estimators.regvar.solvers import Solver

_DRAWS = 16
"""Posterior draws or probes; the error falls with their square root."""
_MAX_ROWS = 500
"""Rows beyond which one solve per output takes too long."""
_LAM = 0.1
"""λ of the amortised form, the centre of the values that tuning tries."""


def _regvar(regularizer: Callable[[int], Regularizer], solver: Callable[[int], Solver | str]) -> Build:
    """Return a function that builds RegVar with a regularizer and a solver made from the seed."""

    def build(problem: Problem, seed: int) -> UncertaintyEstimator:
        return RegVar(
            problem.model,
            problem.likelihood,
            prior_precision=problem.prior_precision,
            regularizer=regularizer(seed),
            solver=solver(seed),
        )

    return build


def _draws(seed: int) -> PosteriorDraws:
    return PosteriorDraws(n_draws=_DRAWS, seed=seed)


def _limit(seed: int) -> LinearResponse:  # noqa: ARG001
    return LinearResponse()


def _pointwise(problem: Problem, seed: int) -> UncertaintyEstimator:
    loaders = (loader for name, loader in problem.sets().items() if name not in ("train", "plot_grid"))
    n_rows = sum(len(query) for loader in loaders for query in queries(loader, problem.layout))
    if n_rows > _MAX_ROWS:
        raise UnsupportedError(
            f"a problem of at most {_MAX_ROWS} rows beside the training rows, with one solve per output",
            received=f"one of {n_rows} rows",
            remedy="laplace gives the same variance if a dense matrix fits into memory; regvar approximates it.",
        )
    return _regvar(lambda _: Pointwise(), _limit)(problem, seed)


PRESETS = [
    Method(
        "regvar-finetune",
        f"RegVar, {_DRAWS} posterior draws, each a short refit by minibatches",
        _regvar(_draws, lambda seed: FineTune(seed=seed)),
        default=True,
        tuned_option=PRIOR,
    ),
    Method(
        "regvar",
        f"RegVar by default: {_DRAWS} posterior draws, and the variance to a measured error of 5 %",
        _regvar(_draws, lambda _: "auto"),
        default=True,
        tuned_option=PRIOR,
    ),
    Method(
        "regvar-pointwise",
        "RegVar, one solve per test output: exact up to the tolerance of block CG",
        _pointwise,
        tuned_option=PRIOR,
    ),
    Method(
        "regvar-amortized",
        "RegVar as published, amortised: one solve for mean |f|; a sign-weighted covariance, not the variance",
        _regvar(lambda seed: MeanAbsolute(), _limit),  # noqa: ARG005
        default=True,
        tuned_option=PRIOR,
    ),
    Method(
        "regvar-amortized-finetune",
        "RegVar as published, amortised, by minibatch refits at a finite λ, which is tuned",
        _regvar(lambda _: MeanAbsolute(), lambda seed: FineTune(lam=_LAM, seed=seed)),
        tuned_option=around("solver.lam", _LAM, decades=2),
    ),
    Method(
        "regvar-param-probes",
        f"RegVar, {_DRAWS} random directions of the weights; unbiased, noisy, can be negative",
        _regvar(lambda seed: ParameterProbes(n_probes=_DRAWS, seed=seed), _limit),
        tuned_option=PRIOR,
    ),
]
