"""RegVar: a regularizer and a solver on an objective centred at the trained weights, and the paper's own form."""

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
_SOLVABLE = 500
_LAM = 0.1


def _regvar(regularizer: Callable[[int], Regularizer], solver: Callable[[int], Solver]) -> Build:
    """A build of RegVar whose parts are made from the seed of the cell."""

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


def _probes(seed: int) -> ParameterProbes:
    return ParameterProbes(n_probes=_DRAWS, seed=seed)


def _limit(seed: int) -> LinearResponse:  # noqa: ARG001
    return LinearResponse()


def _fine_tune(seed: int) -> FineTune:
    return FineTune(seed=seed)


def _pointwise(problem: Problem, seed: int) -> UncertaintyEstimator:
    loaders = (loader for name, loader in problem.sets().items() if name not in ("train", "plot_grid"))
    n_rows = sum(len(query) for loader in loaders for query in queries(loader, problem.layout))
    if n_rows > _SOLVABLE:
        raise UnsupportedError(
            f"a problem of at most {_SOLVABLE} rows beside the training rows, each of whose outputs is solved for",
            received=f"one of {n_rows} rows",
            remedy="laplace gives the same variance where a dense matrix fits; regvar comes close to it.",
        )
    return _regvar(lambda _: Pointwise(), _limit)(problem, seed)


PRESETS = [
    Method(
        "regvar-finetune",
        f"RegVar, {_DRAWS} posterior draws, each a short minibatch refit",
        _regvar(_draws, _fine_tune),
        default=True,
        axis=PRIOR,
    ),
    Method(
        "regvar",
        f"RegVar, {_DRAWS} posterior draws, solved together by block CG",
        _regvar(_draws, _limit),
        default=True,
        axis=PRIOR,
    ),
    Method(
        "regvar-pointwise",
        "RegVar, one solve for each test output: exact, as far as block CG goes",
        _pointwise,
        axis=PRIOR,
    ),
    Method(
        "regvar-amortized",
        "RegVar as published, amortised: one solve for mean |f|; a sign-weighted covariance, not the variance",
        _regvar(lambda seed: MeanAbsolute(), _limit),  # noqa: ARG005
        default=True,
        axis=PRIOR,
    ),
    Method(
        "regvar-amortized-finetune",
        "the same by minibatch refits at a finite λ, which is what tuning walks along",
        _regvar(lambda _: MeanAbsolute(), lambda seed: FineTune(lam=_LAM, seed=seed)),
        axis=around("solver.lam", _LAM, decades=2),
    ),
    Method(
        "regvar-param-probes",
        f"RegVar, {_DRAWS} random directions of the weights; unbiased, noisy, can be negative",
        _regvar(_probes, _limit),
        axis=PRIOR,
    ),
]
