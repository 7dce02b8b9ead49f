"""Checks of the posterior over weights, Jacobians, covariances between rows, and gradients by the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from estimators.errors import NotFittedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.testing import formulas
from estimators.testing.case_selection import any_case
from estimators.testing.checks.covariances import compare_moments
from estimators.testing.estimator_under_test import UNSUPPORTED_ERRORS, EstimatorUnderTest, as_array, if_supported
from estimators.testing.networks import Array
from estimators.testing.outcomes import CheckFailure
from estimators.testing.registry import check

__all__: list[str] = []

_STEP = 1e-5
"""The step of a central difference, for inputs of about 1 in float64."""
_GRADIENT_RTOL = 1e-4
"""Largest error of a gradient relative to its largest entry."""


def _optional_queries(estimator: UncertaintyEstimator, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return the queries that an estimator may leave unsupported, by name."""
    return {
        "covariance": lambda: estimator.covariance(x),
        "joint_covariance": lambda: estimator.joint_covariance(x),
        "sample": lambda: estimator.sample(x, 2),
        "score": lambda: estimator.score(x),
        "sample_weights": lambda: estimator.sample_weights(2),
        "sample_nonlinear": lambda: estimator.sample_nonlinear(x, 2),
        "posterior_precision": estimator.posterior_precision,
        "posterior_covariance": estimator.posterior_covariance,
        "posterior_variance": estimator.posterior_variance,
        "log_marginal_likelihood": estimator.log_marginal_likelihood,
        "variance of inputs that require a gradient": lambda: estimator.variance(x.clone().requires_grad_()),
    }


@check("optional-queries")
def optional_queries(tested: EstimatorUnderTest) -> None:
    """Queries that an estimator may lack give a result or an UnsupportedError, and NotFittedError before `fit`."""
    case = any_case(tested)
    for fitted in (False, True):
        estimator = tested.fitted(case) if fitted else tested.build(case)
        allowed = UNSUPPORTED_ERRORS if fitted else (NotFittedError,)
        for name, query in _optional_queries(estimator, case.queries).items():
            try:
                query()
            except allowed:
                continue
            except Exception as error:
                received = f"{type(error).__name__}: {error}"
            else:
                if fitted:
                    continue
                received = "a result"
            raise CheckFailure(
                f"{'a result or UnsupportedError' if fitted else 'NotFittedError'} from {name} "
                f"{'after' if fitted else 'before'} fit",
                received=received,
                fault="override _weight_precision, _weight_displacements, _covariance_along or _sample.",
            )


@check("jacobians")
def jacobians(tested: EstimatorUnderTest) -> None:
    """The Jacobians are ∂f/∂θ over the weights of the posterior, and come with the outputs."""
    case = tested.cases["classification"]
    chosen = case.network.last if tested.prior_of == "last_layer" else np.ones_like(case.network.last)
    jacobian, f = (as_array(tensor) for tensor in tested.fitted(case).jacobians(case.queries))
    fault = "rows and outputs exchanged, or another order of the weights."
    tested.compare("the outputs", f, case.network.outputs(case.query), fault=fault, rtol=1e-9)
    expected = case.network.jacobian(case.query)[..., chosen]
    tested.compare("the Jacobian", jacobian, expected, fault=fault, rtol=1e-9)


@check("joint-covariance")
def joint_covariance(tested: EstimatorUnderTest) -> None:
    """The covariance between rows is symmetric, positive semidefinite, and has `covariance` on its diagonal."""
    case = tested.cases["classification"]
    estimator = tested.fitted(case)
    found = as_array(if_supported(lambda: estimator.joint_covariance(case.queries)))
    m, c = tested.variance(case).shape
    if found.shape != (m, c, m, c):
        raise CheckFailure(
            f"a joint covariance of shape {(m, c, m, c)}", received=f"{found.shape}", fault="outputs come after rows."
        )
    fault = "rows and outputs exchanged in a reshape, or rows taken as independent."
    rtol = max(1e-6, tested.capabilities.tolerance)
    of_rows = np.einsum("mcmd->mcd", found)
    tested.compare("the covariance of each row", of_rows, tested.covariance(case), fault=fault, rtol=rtol)
    flat = found.reshape(m * c, m * c)
    scale = float(np.abs(flat).max())
    skew, least = float(np.abs(flat - flat.T).max()), float(np.linalg.eigvalsh(flat).min())
    if skew > 1e-8 * scale or least < -1e-8 * scale:
        raise CheckFailure(
            "a symmetric, positive semidefinite joint covariance",
            received=f"a skew part of {skew:.3g}, a smallest eigenvalue of {least:.3g}, entries up to {scale:.3g}",
            fault=fault,
        )
    if tested.capabilities.exact is not None and tested.capabilities.noise == 0:
        expected = formulas.covariance(case, tested.exact)
        tested.compare("the covariance between rows", flat, expected, fault=fault)


@check("posterior-matrices")
def posterior_matrices(tested: EstimatorUnderTest) -> None:
    """The covariance over the uncertain weights has `posterior_variance` as diagonal, and gives J Σ Jᵀ."""
    case = tested.cases["classification"]
    estimator = tested.fitted(case)
    found = as_array(if_supported(estimator.posterior_covariance))
    variance = as_array(if_supported(estimator.posterior_variance))
    fault = "a precision for a covariance, or another order of the weights."
    chosen = variance > 0  # all others are fixed, and have no entries in the matrices
    tested.compare(
        "posterior_variance on the diagonal", variance[chosen], np.diagonal(found).copy(), fault=fault, rtol=1e-6
    )
    jacobian = as_array(estimator.jacobians(case.queries)[0])[..., chosen]
    outputs = np.einsum("mcp,pq,mdq->mcd", jacobian, found, jacobian)
    rtol = max(1e-6, tested.capabilities.tolerance)
    tested.compare("J Σ Jᵀ with posterior_covariance", outputs, tested.covariance(case), fault=fault, rtol=rtol)
    precision = as_array(if_supported(estimator.posterior_precision))
    inverse = np.asarray(np.linalg.inv(found), dtype=np.float64)
    tested.compare("the inverse of posterior_covariance", precision, inverse, fault=fault, rtol=1e-5)


@check("weight-samples")
def weight_samples(tested: EstimatorUnderTest) -> None:
    """With one seed, `sample` is the linearized function at the weights of `sample_weights`."""
    case = tested.cases["classification"]
    estimator = tested.fitted(case)
    weights = as_array(if_supported(lambda: estimator.sample_weights(3, seed=5)))
    samples = as_array(if_supported(lambda: estimator.sample(case.queries, 3, seed=5)))
    jacobian, f = (as_array(tensor) for tensor in estimator.jacobians(case.queries))
    displaced = weights - as_array(estimator.theta_)
    expected = f + np.einsum("mcp,sp->smc", jacobian, displaced)
    fault = "weights without θ̂ added, or random numbers in another order."
    tested.compare("f + J(θ − θ̂) at the sampled weights", samples, expected, fault=fault, rtol=1e-6)


@check("weight-moments")
def weight_moments(tested: EstimatorUnderTest) -> None:
    """Samples of weights have the covariance A⁻¹, within six standard errors."""
    case = tested.cases["classification"]
    estimator, n = tested.fitted(case), tested.capabilities.n_samples
    weights = as_array(if_supported(lambda: estimator.sample_weights(n)))
    displaced = weights - as_array(estimator.theta_)
    compare_moments(displaced.T @ displaced / n, _weight_covariance(tested), n, "the covariance of weights")


def _weight_covariance(tested: EstimatorUnderTest) -> Array:
    """Return the covariance (P, P) over the weights, in closed form if there is one; 0 for fixed weights."""
    case = tested.cases["classification"]
    if tested.capabilities.exact is not None:
        return formulas.weight_covariance(case, tested.exact)
    found = as_array(if_supported(tested.fitted(case).posterior_covariance))
    chosen = as_array(if_supported(tested.fitted(case).posterior_variance)) > 0
    covariance = np.zeros((len(chosen), len(chosen)))
    covariance[np.ix_(chosen, chosen)] = found
    return covariance


@check("input-gradients")
def input_gradients(tested: EstimatorUnderTest) -> None:
    """If x requires a gradient, that of the variance by x agrees with central differences."""
    case = tested.cases["classification"]
    estimator, x = tested.fitted(case), case.queries[:2]
    leaf = x.clone().requires_grad_()
    variance = if_supported(lambda: estimator.variance(leaf))
    if not variance.requires_grad:
        raise CheckFailure(
            "a variance with a graph, or UnsupportedError, if x requires a gradient",
            received="a detached variance",
            fault="override _covariance_along, which is differentiable, or none of the hooks of weights.",
        )
    gradient = as_array(torch.autograd.grad(variance.sum(), leaf)[0])
    expected = np.zeros_like(gradient)
    for index in np.ndindex(*gradient.shape):
        step = torch.zeros_like(x)
        step[index] = _STEP
        difference = estimator.variance(x + step).sum() - estimator.variance(x - step).sum()
        expected[index] = float(difference) / (2 * _STEP)
    tested.compare(
        "the gradient of the variance by x", gradient, expected, fault="a detached Jacobian.", rtol=_GRADIENT_RTOL
    )
