"""The closed forms of the kit's cases in numpy, independent of the library's algebra."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from estimators.testing.cases import Case
from estimators.testing.networks import Array, Dense

__all__ = ["covariance", "link", "prior_variance", "smallest_eigenvalue"]

_STEP = 1e-5


def covariance(case: Case, exact: str, *, frozen_first: bool = False) -> Array:
    """Return J A⁻¹ Jᵀ between all outputs of all queries, (M·C, M·C).

    Args:
        case: the problem.
        exact: "ggn", "hessian", or "last_layer" (the GGN over the last layer).
        frozen_first: whether the first layer is fixed.
    """
    chosen = _chosen(case, exact, frozen_first=frozen_first)
    inverse = np.linalg.inv(_precision(case, exact)[np.ix_(chosen, chosen)])
    jacobian = case.network.jacobian(case.query)[..., chosen].reshape(-1, int(chosen.sum()))
    return np.asarray(jacobian @ inverse @ jacobian.T)


def prior_variance(case: Case, subset: str) -> Array:
    """Return the diagonal of J δ⁻¹ Jᵀ over all weights or the last layer, (M, C)."""
    chosen = case.network.last if subset == "last_layer" else np.ones_like(case.network.last)
    scaled = case.network.jacobian(case.query)[..., chosen] ** 2 / _delta(case)[chosen]
    return np.asarray(scaled.sum(-1))


def smallest_eigenvalue(case: Case, exact: str) -> float:
    """Return the smallest eigenvalue of A."""
    return float(np.linalg.eigvalsh(_precision(case, exact))[0])


def link(case: Case, mean: Array, variance: Array) -> Array:
    """Return class probabilities by the probit approximation, (M, C)."""
    scaled = mean / np.sqrt(1 + np.pi / 8 * variance)
    if case.kind == "binary":
        return np.asarray(1 / (1 + np.exp(-scaled)))
    return _softmax(scaled)


def _chosen(case: Case, exact: str, *, frozen_first: bool) -> NDArray[np.bool_]:
    last = case.network.last
    return last if exact == "last_layer" or frozen_first else np.ones_like(last)


def _delta(case: Case) -> Array:
    """Return δ (P,)."""
    if isinstance(case.delta, float):
        return np.full(case.network.last.shape, case.delta)
    return np.where(case.network.biases, case.delta["*bias"], case.delta["*"])


def _precision(case: Case, exact: str) -> Array:
    """Return A (P, P)."""
    prior, jacobian = np.diag(_delta(case)), case.network.jacobian(case.x)
    if exact == "hessian":
        return _hessian(case) + prior
    return np.asarray(np.einsum("ncp,ncd,ndq->pq", jacobian, _curvature(case), jacobian)) + prior  # Σ Jᵀ Λ J + δ


def _curvature(case: Case) -> Array:
    """Return Λ (N, C, C)."""
    f = case.network.outputs(case.x)
    if case.kind == "regression":
        diagonal = np.broadcast_to(1 / np.square(case.sigma), f.shape)
        return np.asarray(diagonal[..., None] * np.eye(f.shape[1]))
    if case.kind == "binary":
        p = 1 / (1 + np.exp(-f))
        return np.asarray((p * (1 - p))[..., None] * np.eye(f.shape[1]))
    p = _softmax(f)
    return np.asarray(p[..., None] * np.eye(f.shape[1]) - p[:, :, None] * p[:, None, :])


def _data_gradient(case: Case, network: Dense) -> Array:
    """Return the gradient of the data term of L, (P,)."""
    f = network.outputs(case.x)
    if case.kind == "regression":
        residual = (f - case.y) / np.square(case.sigma)
    elif case.kind == "binary":
        residual = 1 / (1 + np.exp(-f)) - case.y
    else:
        residual = _softmax(f) - np.eye(f.shape[1])[case.y.astype(int)]
    return np.asarray(np.einsum("ncp,nc->p", network.jacobian(case.x), residual))


def _hessian(case: Case) -> Array:
    """Return the Hessian of the data term of L by central differences of its gradient, (P, P)."""
    steps = _STEP * np.eye(len(case.network.last))
    rows = [
        _data_gradient(case, case.network.at_step(s)) - _data_gradient(case, case.network.at_step(-s)) for s in steps
    ]
    hessian = np.stack(rows) / (2 * _STEP)
    return np.asarray(0.5 * (hessian + hessian.T))


def _softmax(f: Array) -> Array:
    e = np.exp(f - f.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))
