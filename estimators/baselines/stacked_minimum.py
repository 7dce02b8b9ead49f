"""Minima of several convex losses of a last linear layer at once, by L-BFGS in coordinates where curvature is about one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.errors import NotConvergedWarning
from estimators.progress import track

__all__ = ["Whitening", "stacked_minimum"]

LossAndSlope = Callable[[Tensor], tuple[Tensor, Tensor]]

_STEPS_A_ROUND = 10
_JITTER = 1e-12


@dataclass(frozen=True)
class Whitening:
    """Coordinates v of a layer w (..., C, E), w_c = B D_c v_c, in which P_c = κ_c G + diag δ is the identity.

    `basis` B (E, E), `scale` D (C, E).
    """

    basis: Tensor
    scale: Tensor

    @classmethod
    def of(cls, gram: Tensor, curvature: Tensor, delta: Tensor) -> Whitening:
        """From G = Σ φφᵀ (E, E), κ (C,), a curvature by each output, and δ (E,), alike for all outputs.

        With LLᵀ = G̃ = κ̄G + diag δ and L⁻¹(κ̄G)L⁻ᵀ = U diag(q) Uᵀ, B = L⁻ᵀU turns κ̄G into diag q and δ into 1 − q, so
        that one basis serves all κ. A jitter keeps L alive where G̃ is singular; it moves no minimum.
        """
        mean = curvature.mean()
        total = mean * gram + delta.diag()
        prior = delta + _JITTER * total.diagonal().max() + torch.finfo(total.dtype).tiny
        factor = torch.linalg.cholesky(mean * gram + prior.diag())
        half = torch.linalg.solve_triangular(factor, mean * gram, upper=False)
        moved = torch.linalg.solve_triangular(factor, half.T, upper=False)
        q, rotation = torch.linalg.eigh(0.5 * (moved + moved.T))
        q = q.clamp(0, 1 - torch.finfo(q.dtype).eps)
        basis = torch.linalg.solve_triangular(factor.T, rotation, upper=True)
        diagonal = torch.outer(curvature / mean, q) + 1 - q
        return cls(basis, diagonal.rsqrt())

    def displacement(self, v: Tensor) -> Tensor:
        """w of v."""
        return (v * self.scale) @ self.basis.T

    def slope(self, slope: Tensor) -> Tensor:
        """The slope by v of a slope by w."""
        return (slope @ self.basis) * self.scale


def stacked_minimum(
    loss_and_slope: LossAndSlope, start: Tensor, whitening: Whitening, *, max_iter: int, progress_bar: bool
) -> Tensor:
    """argmin of Σ_s L_s(w_s) from `start` (S, C, E), full-batch L-BFGS with strong Wolfe line search.

    It ends where |P^−½ ∂L_s/∂w_s| of every s is below 1e-6 (float32: 1e-3) of its value at the start.
    Warns: NotConvergedWarning where one is not after `max_iter` iterations.
    """
    v = torch.zeros_like(start)
    optimizer = torch.optim.LBFGS(
        [v], max_iter=_STEPS_A_ROUND, history_size=20, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss, slope = loss_and_slope(start + whitening.displacement(v))
        v.grad = whitening.slope(slope)
        return loss

    def steepness() -> Tensor:
        slope = loss_and_slope(start + whitening.displacement(v))[1]
        return whitening.slope(slope).flatten(1).norm(dim=1)

    tolerance = 1e-6 if start.dtype == torch.float64 else 1e-3
    first = left = steepness()
    for _ in track(range(-(-max_iter // _STEPS_A_ROUND)), "iterations", shown=progress_bar):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        left = steepness()
        if bool((left <= tolerance * first).all()):
            break
    else:
        worst = float((left / first).max())
        warnings.warn(
            f"heads were left with a slope of up to {worst:.1e} of that at the start, {tolerance:.0e} being aimed at, "
            f"after {max_iter} iterations: raise max_iter",
            NotConvergedWarning,
            stacklevel=2,
        )
    return start + whitening.displacement(v)
