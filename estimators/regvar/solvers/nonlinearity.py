"""The nonlinearity ratio ‖Δf − JΔθ‖ / ‖JΔθ‖ of displaced weights, and the λ that it allows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from estimators.objective.objective import Objective
from estimators.regvar.perturbation import Perturbation

__all__ = ["nonlinearity", "select_lam"]

_LARGEST_LAM = 0.1
"""The first λ that is tried, the value of the paper."""
_HALVINGS = 20
"""How often λ is halved at most, down to 1e-7: below, round-off dominates in float32."""
_MAX_RATIO = 0.01
"""Nonlinearity ratio that is accepted at the start: during a refit it may rise fivefold (docs/math.md, section 6)."""
_MAX_PROBED = 8
"""Displacements that the ratio is computed for. It is one number for all of them, and eight determine it well."""


def nonlinearity(objective: Objective, displacement: Tensor, lam: float) -> float:
    """Return the nonlinearity ratio for Δθ = λ · displacement, (K, P), on the first batch."""
    return _ratio_by_lam(objective, displacement)(lam)


def select_lam(objective: Objective, perturbation: Perturbation) -> float:
    """Return the largest λ of 0.1, 0.05, 0.025, … with a nonlinearity ratio ≤ 0.01 at the start of a refit.

    The error from nonlinearity decreases with λ and the error from round-off increases. If round-off keeps the ratio
    above 0.01 at every λ, the λ with the smallest ratio is returned. A perturbation without an initial guess is probed
    along ∇r/δ, which is at least as long as the solution A⁻¹∇r.
    """
    displacement = perturbation.initial_guess
    if displacement is None:
        displacement = perturbation.gradient / _positive(objective.prior.precision)
    smallest_ratio, best = math.inf, _LARGEST_LAM
    with objective.network.pass_counter.phase("search for lam"):
        ratio_at = _ratio_by_lam(objective, displacement)
        for lam in (_LARGEST_LAM / 2**halvings for halvings in range(_HALVINGS + 1)):
            ratio = ratio_at(lam)
            if ratio < smallest_ratio:
                smallest_ratio, best = ratio, lam
            if ratio <= _MAX_RATIO:
                break
    return best


def _ratio_by_lam(objective: Objective, displacement: Tensor) -> Callable[[float], float]:
    """Return the nonlinearity ratio as a function of λ, which costs one forward pass per displacement."""
    network, x = objective.network, next(iter(objective.batches)).x
    probed = displacement[:_MAX_PROBED]
    response, f = network.jvp(x, probed), network.outputs(x)  # JD and f(θ̂)

    def ratio(lam: float) -> float:
        with torch.no_grad():
            change = torch.stack([network(objective.theta + lam * d, x) - f for d in probed])  # Δf
        linear = lam * response  # JΔθ
        scale = float(linear.norm())
        return 0.0 if scale == 0 else float((change - linear).norm()) / scale

    return ratio


def _positive(prior_precision: Tensor) -> Tensor:
    """Return δ, with its positive mean for parameters without a prior."""
    positive = prior_precision[prior_precision > 0]
    return torch.where(prior_precision > 0, prior_precision, positive.mean() if len(positive) else 1.0)
