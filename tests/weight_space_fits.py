"""Fits of every estimator with a posterior over weights, and a comparison relative to the largest entry."""

import pytest

from estimators import LastLayerLaplace, LinearizedLaplace, LinearResponse, PosteriorDraws, RegVar
from estimators.baselines import SubnetworkLaplace
from estimators.regvar.monte_carlo import ClippedMonteCarlo, InterpolatedBounds

__all__ = ["EXACT", "GENERAL", "LAPLACE", "REGVAR", "close", "fit", "kinds", "posteriors"]

GENERAL = {"*bias": 0.7, "*": 1.9}
LAPLACE = {
    "cholesky": (LinearizedLaplace, {"inverse": "cholesky", "prior_precision": GENERAL}),
    "dual": (LinearizedLaplace, {"inverse": "dual", "prior_precision": GENERAL}),
    "matrix_free_dual": (LinearizedLaplace, {"inverse": "matrix_free_dual", "prior_precision": GENERAL}),
    "cg": (LinearizedLaplace, {"inverse": "cg", "prior_precision": GENERAL}),
    "hessian": (LinearizedLaplace, {"curvature": "hessian", "prior_precision": 60.0}),
    "lowrank": (LinearizedLaplace, {"hessian_structure": "lowrank", "rank": 5, "prior_precision": GENERAL}),
    "kron": (LinearizedLaplace, {"hessian_structure": "kron", "prior_precision": {"0.*": 0.7, "*": 1.9}}),
    "ekfac": (LinearizedLaplace, {"hessian_structure": "ekfac", "prior_precision": {"0.*": 0.7, "*": 1.9}}),
    "diag": (LinearizedLaplace, {"hessian_structure": "diag", "prior_precision": GENERAL}),
    "last layer": (LastLayerLaplace, {"prior_precision": GENERAL}),
    "last layer, kron": (LastLayerLaplace, {"hessian_structure": "kron", "prior_precision": 1.9}),
    "last layer, diag": (LastLayerLaplace, {"hessian_structure": "diag", "prior_precision": GENERAL}),
    "subnetwork": (SubnetworkLaplace, {"n_parameters": 11, "prior_precision": GENERAL}),
}
EXACT = {"cholesky": "ggn", "dual": "ggn", "matrix_free_dual": "ggn", "cg": "ggn", "hessian": "hessian"}
REGVAR = {
    "draws": PosteriorDraws(9, rao_blackwell=None),
    "draws, last layer": PosteriorDraws(9, rao_blackwell="last_layer", variance_estimate="monte_carlo"),
    "bounds": PosteriorDraws(9, variance_estimate="bounds"),
    "auto": PosteriorDraws(9),
}
kinds = pytest.mark.parametrize("kind", ["regression", "classification"])
posteriors = pytest.mark.parametrize("name", [*LAPLACE, *REGVAR, "clipped"])


def fit(name, problem):
    """A fit by its name; queries of the problem have other rows than the training data."""
    if name in LAPLACE:
        kind, options = LAPLACE[name]
        return kind(problem.model, problem.likelihood, **options).fit(problem.loader)
    regularizer = REGVAR["bounds" if name == "clipped" else name]
    regvar = RegVar(
        problem.model,
        problem.likelihood,
        prior_precision=1.9,
        regularizer=regularizer,
        solver="auto" if name == "auto" else LinearResponse(max_iter=3 if name in ("bounds", "clipped") else 1000),
    ).fit(problem.loader)
    if name == "clipped":
        bounded = regvar.variance_estimate_
        assert isinstance(bounded, InterpolatedBounds)
        regvar.variance_estimate_ = ClippedMonteCarlo(bounded, bounded.bounds, bounded.interpolation)
    return regvar


def close(found, expected, rtol=1e-7):
    scale = float(expected.abs().max())
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * scale
