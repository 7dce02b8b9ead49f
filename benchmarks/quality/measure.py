"""Measurement of a row: the variance of each method, compared with the exact one of the full GGN."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from bdl_bench.problem.problem import Problem
from benchmarks.quality.networks import trained_problem
from benchmarks.records import Measured
from estimators import FineTune, LastLayerLaplace, LinearizedLaplace, LinearResponse, PosteriorDraws, RegVar
from estimators.baselines import DeepEnsemble, MCDropout
from estimators.errors import NotConvergedWarning
from estimators.regvar.solvers import Solver
from estimators.regvar.solvers.fine_tune import DEFAULT_RECIPE

__all__ = ["EPOCHS", "MEMBERS", "measure_quality"]

TRAINING = 100
"""Passes over the rows that the training of one network takes."""
QUERIES = {"mlp": 500, "cnn": 60}
DRAWS = {"mlp": (16, 64), "cnn": (16,)}
EPOCHS = {"mlp": (2, 4, 8, 16, 32), "cnn": (4, 8)}
ITERATIONS = {"mlp": (1, 2, 4, 6, 8), "cnn": (2, 4)}
MEMBERS = {"mlp": (3, 10), "cnn": (4,)}
_DROPOUT, _SAMPLES = 0.1, 100


def measure_quality(network: str, delta: float, seed: int) -> Measured:
    """Return one point per method: total passes over the rows, seconds, and agreement with the exact variance."""
    torch.set_num_threads(1)
    problem = trained_problem(network, delta, seed)
    x = torch.cat([x for x, _ in problem.test])[: QUERIES[network]]
    exact = LinearizedLaplace(problem.model, "classification", prior_precision=delta).fit(problem.train).variance(x)
    points: list[Measured] = []

    def add_point(method: str, measure: Callable[[], tuple[Tensor, float, Measured]]) -> None:
        start = time.perf_counter()
        variance, passes, extra = measure()
        seconds = time.perf_counter() - start
        points.append({"method": method, "passes": passes, "seconds": seconds, **scores(variance, exact), **extra})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        for k in DRAWS[network]:
            exact_draws = LinearResponse(tol=1e-5)
            add_point(f"exact draws, K = {k}", lambda: regvar(problem, x, k, exact_draws, "monte_carlo", seed))  # noqa: B023
            add_point(f"FineTune, default, K = {k}", lambda: regvar(problem, x, k, FineTune(), "monte_carlo", seed))  # noqa: B023
        add_point("RegVar, default", lambda: regvar(problem, x, 16, "auto", "auto", seed))
        add_point("LinearResponse, default", lambda: regvar(problem, x, 16, LinearResponse(), "auto", seed))
        for epochs in EPOCHS[network]:
            solver = FineTune(recipe=replace(DEFAULT_RECIPE, epochs=epochs))
            for name, rao_blackwell in (("FineTune", "auto"), ("FineTune, plain draws", None)):
                add_point(name, lambda: regvar(problem, x, 16, solver, "monte_carlo", seed, rao_blackwell))  # noqa: B023
        for iterations in ITERATIONS[network]:
            krylov = LinearResponse(max_iter=iterations)
            add_point("LinearResponse, bounds", lambda: regvar(problem, x, 16, krylov, "bounds", seed))  # noqa: B023
    for members in MEMBERS[network]:
        add_point("deep ensemble", lambda: ensemble(problem, x, members, seed))  # noqa: B023
    add_point("MC dropout", lambda: dropout(network, delta, seed, x))
    add_point("last layer, times its best constant", lambda: last_layer(problem, x, exact))
    return {"points": points, "n_parameters": sum(p.numel() for p in problem.model.parameters())}


def regvar(
    problem: Problem,
    x: Tensor,
    k: int,
    solver: Solver | str,
    variance_estimate: str,
    seed: int,
    rao_blackwell: str | None = "auto",
) -> tuple[Tensor, float, Measured]:
    """Return the variance of RegVar at x, the total passes of its k draws, and the A-norm error."""
    draws = PosteriorDraws(k, seed=seed, variance_estimate=variance_estimate, rao_blackwell=rao_blackwell)
    delta = problem.prior_precision
    fitted = RegVar(problem.model, "classification", prior_precision=delta, regularizer=draws, solver=solver)
    fitted.fit(problem.train)
    extra = {"passes_per_draw": fitted.fit_report_.total_passes, "a_norm_error": fitted.a_norm_error_}
    return fitted.variance(x), k * fitted.fit_report_.total_passes, extra


def ensemble(problem: Problem, x: Tensor, members: int, seed: int) -> tuple[Tensor, float, Measured]:
    """Return the variance of a deep ensemble, and its passes, which include the training of the given network."""
    assert problem.make_model is not None
    assert problem.recipe is not None
    fitted = DeepEnsemble(
        problem.model,
        "classification",
        make_model=problem.make_model,
        recipe=problem.recipe,
        n_members=members,
        seed=seed,
        prior_precision=problem.prior_precision,
    ).fit(problem.train)
    return fitted.variance(x), TRAINING + fitted.fit_report_.passes["training"], {"members": members}


def dropout(network: str, delta: float, seed: int, x: Tensor) -> tuple[Tensor, float, Measured]:
    """Return the variance of MC dropout, of a network that is trained with dropout, and the passes of its training."""
    problem = trained_problem(network, delta, seed, dropout=_DROPOUT)
    fitted = MCDropout(problem.model, "classification", n_samples=_SAMPLES, seed=seed).fit(problem.train)
    return fitted.variance(x), TRAINING, {}


def last_layer(problem: Problem, x: Tensor, exact: Tensor) -> tuple[Tensor, float, Measured]:
    """Return the last-layer variance times the constant with the least relative RMSE.

    The constant is found from the exact variance, which is not known in real use.
    """
    fitted = LastLayerLaplace(problem.model, "classification", prior_precision=problem.prior_precision)
    ratio = (variance := fitted.fit(problem.train).variance(x)) / exact
    constant = float(ratio.sum() / ratio.square().sum())
    return constant * variance, 1, {"constant": constant}


def scores(variance: Tensor, exact: Tensor) -> dict[str, float]:
    """Return measures of agreement over all queries and outputs."""
    ratio = variance / exact
    return {
        "spearman": float(spearmanr(variance.flatten(), exact.flatten())[0]),
        "relative_rmse": float(np.sqrt(float((ratio - 1).square().mean()))),
        "mean_ratio": float(variance.mean() / exact.mean()),
    }
