"""Minima of several convex losses of a last layer at once, by L-BFGS in coordinates where curvature is about one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.errors import NotConvergedWarning
from estimators.runtime.progress import track

__all__ = ["Whitening", "stacked_minimum"]

LossAndSlope = Callable[[Tensor], tuple[Tensor, Tensor]]

_ITERATIONS_A_ROUND = 25
_JITTER = 1e-12


@dataclass(frozen=True)
class Whitening:
    """Coordinates v of layers w (S, C, E), w_sc = B_s D_sc v_sc, in which P_sc = κ_sc G_s + diag δ is the identity.

    `basis` B (S, E, E), `scale` D (S, C, E).
    """

    basis: Tensor
    scale: Tensor

    @classmethod
    def of(cls, gram: Tensor, kappa: Tensor, delta: Tensor) -> Whitening:
        """From G (S, E, E), κ (S, C), positive and with mean 1 over C, and δ (E,), alike for all outputs.

        With LLᵀ = G + diag δ and L⁻¹GL⁻ᵀ = U diag(q) Uᵀ, B = L⁻ᵀU turns G into diag q and δ into 1 − q, so that one
        basis serves all κ. A jitter keeps L alive where G + diag δ is singular; it moves no minimum.
        """
        largest = (gram.diagonal(dim1=-2, dim2=-1) + delta).amax(-1, keepdim=True)
        prior = delta + _JITTER * largest + torch.finfo(gram.dtype).tiny
        factor = torch.linalg.cholesky(gram + prior.diag_embed())
        half = torch.linalg.solve_triangular(factor, prior.sqrt().diag_embed(), upper=False)
        rotation, singular, _ = torch.linalg.svd(half)  # L⁻¹ diag(δ) L⁻ᵀ = U diag(1 − q) Uᵀ
        basis = torch.linalg.solve_triangular(factor.mT, rotation, upper=True)
        rest = singular.square().clamp(max=1)[:, None]
        return cls(basis, (kappa[..., None] * (1 - rest) + rest).rsqrt())

    def displacement(self, v: Tensor) -> Tensor:
        """w of v."""
        return (v * self.scale) @ self.basis.mT

    def slope(self, slope: Tensor) -> Tensor:
        """The slope by v of a slope by w."""
        return (slope @ self.basis) * self.scale


def stacked_minimum(
    loss_and_slope: LossAndSlope,
    start: Tensor,
    whitened_at: Callable[[Tensor], Whitening],
    *,
    max_iter: int,
    progress_bar: bool,
) -> Tensor:
    """argmin of Σ_s L_s(w_s) from `start` (S, C, E), full-batch L-BFGS with strong Wolfe line search.

    Coordinates are whitened anew, at the weights so far, every 25 iterations. It ends where |P^−½ ∂L_s/∂w_s| of every
    s, with P of the start, is below 1e-6 (float32: 1e-3) of its value there.
    Warns: NotConvergedWarning where one is not after `max_iter` iterations.
    """
    tolerance = 1e-6 if start.dtype == torch.float64 else 1e-3
    w, measure = start, whitened_at(start)

    def steepness() -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(measure.slope(loss_and_slope(w)[1]).flatten(1), dim=1)
        return norms

    first = left = steepness()
    for done in track(range(0, max_iter, _ITERATIONS_A_ROUND), "rounds", shown=progress_bar):
        whitening = whitened_at(w) if done else measure
        w = _descended(loss_and_slope, w, whitening, n_iter=min(_ITERATIONS_A_ROUND, max_iter - done))
        left = steepness()
        if bool((left <= tolerance * first).all()):
            return w
    worst = float((left / first).max())
    warnings.warn(
        f"heads were left with a slope of up to {worst:.1e} of that at the start, {tolerance:.0e} being aimed at, "
        f"after {max_iter} iterations: raise max_iter, or the prior precision",
        NotConvergedWarning,
        stacklevel=2,
    )
    return w


def _descended(loss_and_slope: LossAndSlope, w: Tensor, whitening: Whitening, *, n_iter: int) -> Tensor:
    """w after `n_iter` iterations."""
    v = torch.zeros_like(w)
    optimizer = torch.optim.LBFGS(
        [v], max_iter=n_iter, history_size=n_iter, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss, slope = loss_and_slope(w + whitening.displacement(v))
        v.grad = whitening.slope(slope)
        return loss

    optimizer.step(closure)
    return w + whitening.displacement(v)
