"""One network, prior precision and seed: each method's variance against the exact one of the full GGN."""

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
from benchmarks.quality.networks import trained
from benchmarks.records import Measured
from estimators import FineTune, LastLayerLaplace, LinearizedLaplace, LinearResponse, PosteriorDraws, RegVar
from estimators.baselines import DeepEnsemble, MCDropout
from estimators.errors import NotConvergedWarning
from estimators.regvar.solvers import Solver
from estimators.regvar.solvers.fine_tuning.fine_tune import DEFAULT_RECIPE

__all__ = ["EPOCHS", "MEMBERS", "measure_quality"]

TRAINING = 100  # passes
QUERIES = {"mlp": 500, "cnn": 60}
DRAWS = {"mlp": (16, 64), "cnn": (16,)}
EPOCHS = {"mlp": (2, 4, 8, 16, 32), "cnn": (4, 8)}
ITERATIONS = {"mlp": (1, 2, 4, 6, 8), "cnn": (2, 4)}
MEMBERS = {"mlp": (3, 10), "cnn": (4,)}
_DROPOUT, _SAMPLES = 0.1, 100


def measure_quality(network: str, delta: float, seed: int) -> Measured:
    """Points: method, total passes over the rows, seconds, Spearman, relative RMSE, ratio of means."""
    torch.set_num_threads(1)
    problem = trained(network, delta, seed)
    x = torch.cat([x for x, _ in problem.test])[: QUERIES[network]]
    exact = LinearizedLaplace(problem.model, "classification", prior_precision=delta).fit(problem.train).variance(x)
    points: list[Measured] = []

    def point(method: str, answer: Callable[[], tuple[Tensor, float, Measured]]) -> None:
        began = time.perf_counter()
        variance, passes, more = answer()
        seconds = time.perf_counter() - began
        points.append({"method": method, "passes": passes, "seconds": seconds, **scores(variance, exact), **more})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        for k in DRAWS[network]:
            exact_draws = LinearResponse(tol=1e-5)
            point(f"exact draws, K = {k}", lambda: regvar(problem, x, k, exact_draws, "monte_carlo", seed))  # noqa: B023
            point(f"FineTune, default, K = {k}", lambda: regvar(problem, x, k, FineTune(), "monte_carlo", seed))  # noqa: B023
        point("LinearResponse, default", lambda: regvar(problem, x, 16, LinearResponse(), "auto", seed))
        for epochs in EPOCHS[network]:
            solver = FineTune(recipe=replace(DEFAULT_RECIPE, epochs=epochs))
            for name, block in (("FineTune", "auto"), ("FineTune, plain draws", None)):
                point(name, lambda: regvar(problem, x, 16, solver, "monte_carlo", seed, block))  # noqa: B023
        for iterations in ITERATIONS[network]:
            krylov = LinearResponse(max_iter=iterations)
            point("LinearResponse, bounds", lambda: regvar(problem, x, 16, krylov, "bounds", seed))  # noqa: B023
    for members in MEMBERS[network]:
        point("deep ensemble", lambda: ensemble(problem, x, members, seed))  # noqa: B023
    point("MC dropout", lambda: dropout(network, delta, seed, x))
    point("last layer, times its best constant", lambda: last_layer(problem, x, exact))
    return {"points": points, "n_parameters": sum(p.numel() for p in problem.model.parameters())}


def regvar(
    problem: Problem, x: Tensor, k: int, solver: Solver, variance_estimate: str, seed: int, block: str | None = "auto"
) -> tuple[Tensor, float, Measured]:
    """Variance, total passes, A-norm error."""
    draws = PosteriorDraws(k, seed=seed, variance_estimate=variance_estimate, rao_blackwell=block)
    delta = problem.prior_precision
    fitted = RegVar(problem.model, "classification", prior_precision=delta, regularizer=draws, solver=solver)
    fitted.fit(problem.train)
    more = {"passes_a_draw": fitted.fit_report_.total_passes, "a_norm_error": fitted.a_norm_error_}
    return fitted.variance(x), k * fitted.fit_report_.total_passes, more


def ensemble(problem: Problem, x: Tensor, members: int, seed: int) -> tuple[Tensor, float, Measured]:
    """Variance of the outputs between networks trained from other beginnings, the first one's training counted too."""
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
    """Variance of the outputs under dropout, of a network trained with it."""
    problem = trained(network, delta, seed, dropout=_DROPOUT)
    fitted = MCDropout(problem.model, "classification", n_samples=_SAMPLES, seed=seed).fit(problem.train)
    return fitted.variance(x), TRAINING, {}


def last_layer(problem: Problem, x: Tensor, exact: Tensor) -> tuple[Tensor, float, Measured]:
    """Its variance times the constant that is best in relative RMSE, which only the exact variance can tell."""
    fitted = LastLayerLaplace(problem.model, "classification", prior_precision=problem.prior_precision)
    ratio = (variance := fitted.fit(problem.train).variance(x)) / exact
    constant = float(ratio.sum() / ratio.square().sum())
    return constant * variance, 1, {"constant": constant}


def scores(variance: Tensor, exact: Tensor) -> dict[str, float]:
    """Agreement over all queries and outputs."""
    ratio = variance / exact
    return {
        "spearman": float(spearmanr(variance.flatten(), exact.flatten())[0]),
        "relative_rmse": float(np.sqrt(float((ratio - 1).square().mean()))),
        "mean_ratio": float(variance.mean() / exact.mean()),
    }
