"""The named presets that the command line offers: each a choice of parts of the library, in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bdl_bench.problem import Problem
from estimators import (
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    MeanAbsolute,
    PosteriorDraws,
    RegVar,
    UncertaintyEstimator,
)
from estimators.baselines.map import MAP
from estimators.errors import OptionError

__all__ = ["BASELINE", "METHODS", "REFERENCE", "Method", "methods_named"]

Build = Callable[[Problem, int], UncertaintyEstimator]


@dataclass(frozen=True)
class Method:
    """A preset: `build(problem, seed)` gives an estimator yet to be fitted.

    `retrains` marks methods that train networks of their own, and so need `make_model` and `recipe` from the problem.
    """

    name: str
    summary: str
    build: Build
    retrains: bool = False


def _map(problem: Problem, seed: int) -> UncertaintyEstimator:  # noqa: ARG001
    return MAP(problem.model, problem.likelihood, prior_precision=problem.prior_precision)


def _laplace(problem: Problem, seed: int) -> UncertaintyEstimator:  # noqa: ARG001
    return LinearizedLaplace(problem.model, problem.likelihood, prior_precision=problem.prior_precision)


def _last_layer(problem: Problem, seed: int) -> UncertaintyEstimator:  # noqa: ARG001
    return LastLayerLaplace(problem.model, problem.likelihood, prior_precision=problem.prior_precision)


def _draws(problem: Problem, seed: int) -> UncertaintyEstimator:
    regularizer = PosteriorDraws(n_draws=16, seed=seed)
    return RegVar(problem.model, problem.likelihood, prior_precision=problem.prior_precision, regularizer=regularizer)


def _krylov(problem: Problem, seed: int) -> UncertaintyEstimator:
    return RegVar(
        problem.model,
        problem.likelihood,
        prior_precision=problem.prior_precision,
        regularizer=PosteriorDraws(n_draws=16, seed=seed),
        solver=LinearResponse(),
    )


def _mean_absolute(problem: Problem, seed: int) -> UncertaintyEstimator:  # noqa: ARG001
    return RegVar(
        problem.model,
        problem.likelihood,
        prior_precision=problem.prior_precision,
        regularizer=MeanAbsolute(),
        solver=LinearResponse(),
    )


BASELINE = "map"
REFERENCE = "laplace"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("map", "the trained network alone; its epistemic variance is zero", _map),
        Method("laplace", "linearized Laplace with the exact, full GGN: the reference variance", _laplace),
        Method("last-layer", "exact Laplace over the last linear layer, in closed form", _last_layer),
        Method("regvar-draws", "RegVar, 16 posterior draws, each a short minibatch refit", _draws),
        Method("regvar-krylov", "RegVar, 16 posterior draws, solved together by block CG", _krylov),
        Method(
            "regvar-mean-absolute",
            "RegVar as published, amortised: one solve for mean |f|; a sign-weighted covariance, not the variance",
            _mean_absolute,
        ),
    )
}


def methods_named(names: Sequence[str]) -> list[Method]:
    """The presets of these names, in this order and once each."""
    for name in names:
        if name not in METHODS:
            raise OptionError(
                f"methods among {', '.join(METHODS)}",
                received=repr(name),
                remedy="bdl-bench list shows what each does.",
            )
    return [METHODS[name] for name in dict.fromkeys(names)]
