"""Minimise the convex losses of several heads (last layers) together, by L-BFGS in whitened coordinates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.errors import NotConvergedWarning
from estimators.runtime.progress import track

__all__ = ["Whitening", "stacked_minimum"]

LossAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

_ITERATIONS_PER_ROUND = 25
"""L-BFGS iterations between two whitenings."""
_JITTER = 1e-12
"""Added to the prior, relative to the largest curvature, so that a singular matrix can be factored."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""The relative norm of the whitened gradient at which the minimisation ends."""


@dataclass(frozen=True)
class Whitening:
    """Coordinates v of displacements of S heads of C outputs and E features, w = w₀ + B_s D_sc v_sc.

    In them P_sc = κ_sc G_s + diag δ is the identity. It approximates the Hessian for output c of head s: G_s (E, E) is
    the second moment of the features, weighted by the mean curvature of the loss over outputs, and κ_sc the curvature
    of output c relative to that mean.

    Args:
        basis: B (S, E, E).
        scale: D (S, C, E).
    """

    basis: Tensor
    scale: Tensor

    @classmethod
    def of(cls, gram: Tensor, kappa: Tensor, delta: Tensor) -> Whitening:
        """Return the whitening for G (S, E, E), κ (S, C) > 0 with mean 1 over C, and δ (E,), the same for all outputs.

        With LLᵀ = G + diag δ and L⁻¹GL⁻ᵀ = U diag(q) Uᵀ, the basis B = L⁻ᵀU transforms G to diag q and δ to 1 − q, so
        that one basis is enough for all κ. A jitter makes G + diag δ positive definite; it does not move the minimum.
        """
        largest = (gram.diagonal(dim1=-2, dim2=-1) + delta).amax(-1, keepdim=True)
        prior = delta + _JITTER * largest + torch.finfo(gram.dtype).tiny
        factor = torch.linalg.cholesky(gram + prior.diag_embed())
        half = torch.linalg.solve_triangular(factor, prior.sqrt().diag_embed(), upper=False)
        rotation, singular, _ = torch.linalg.svd(half)  # L⁻¹ diag(δ) L⁻ᵀ = U diag(1 − q) Uᵀ
        basis = torch.linalg.solve_triangular(factor.mT, rotation, upper=True)
        prior_share = singular.square().clamp(max=1)[:, None]  # 1 − q
        return cls(basis, (kappa[..., None] * (1 - prior_share) + prior_share).rsqrt())

    def displacement(self, v: Tensor) -> Tensor:
        """Return the change of w from v."""
        return (v * self.scale) @ self.basis.mT

    def gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient in v from the gradient in w."""
        return (gradient @ self.basis) * self.scale


def stacked_minimum(
    loss_and_gradient: LossAndGradient,
    start: Tensor,
    whitening_at: Callable[[Tensor], Whitening],
    *,
    max_iter: int,
    progress_bar: bool,
) -> Tensor:
    """Return the argmin of Σ_s L_s(w_s) from `start` (S, C, E), by full-batch L-BFGS with strong Wolfe line search.

    The coordinates are whitened again, at the current weights, every 25 iterations. The minimisation ends if
    |P^−½ ∂L_s/∂w_s| of every s, with P at the start, is below the tolerance times its value at the start.
    Warns with NotConvergedWarning if that is not reached after `max_iter` iterations.
    """
    tolerance = _TOLERANCE[start.dtype]
    w, at_start = start, whitening_at(start)

    def gradient_norms() -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(at_start.gradient(loss_and_gradient(w)[1]).flatten(1), dim=1)
        return norms

    first = last = gradient_norms()
    for done in track(range(0, max_iter, _ITERATIONS_PER_ROUND), "rounds", shown=progress_bar):
        whitening = whitening_at(w) if done else at_start
        w = _minimize(loss_and_gradient, w, whitening, n_iter=min(_ITERATIONS_PER_ROUND, max_iter - done))
        last = gradient_norms()
        if bool((last <= tolerance * first).all()):
            return w
    worst = float((last / first).max())
    warnings.warn(
        f"the gradient of a head is {worst:.1e} of that at the start after {max_iter} iterations, and should be below "
        f"{tolerance:.0e}: raise max_iter, or the prior precision",
        NotConvergedWarning,
        stacklevel=2,
    )
    return w


def _minimize(loss_and_gradient: LossAndGradient, w: Tensor, whitening: Whitening, *, n_iter: int) -> Tensor:
    """Return w after `n_iter` iterations."""
    v = torch.zeros_like(w)
    optimizer = torch.optim.LBFGS(
        [v], max_iter=n_iter, history_size=n_iter, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss, gradient = loss_and_gradient(w + whitening.displacement(v))
        v.grad = whitening.gradient(gradient)
        return loss

    optimizer.step(closure)
    return w + whitening.displacement(v)
