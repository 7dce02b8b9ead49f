"""λ: the largest at which the network still answers linearly, at the start and where the refits have come to."""

from __future__ import annotations

import torch
from torch import Tensor

from estimators.objective import Objective
from estimators.regvar.penalty import Penalty

__all__ = ["auto_lam", "nonlinearity", "straighter_lam"]

_LINEAR = {torch.float64: 0.005}  # elsewhere 0.05: float32 cannot afford a λ as small
_LARGEST_LAM, _SMALLEST_LAM = 0.1, 1e-6
_PROBED = 8
_BENT, _STRAIGHT = 0.15, 0.08  # what a refit may come to; what is then aimed at


def nonlinearity(objective: Objective, displacement: Tensor, lam: float) -> float:
    """‖Δf − JΔθ‖ / ‖JΔθ‖ for Δθ = λ · displacement (K, P), over the first batch and at most 8 of the displacements.

    Where several processes share out the draws, over those of all.
    """
    network, x = objective.network, next(iter(objective.batches)).x
    some = displacement[:_PROBED]
    linear = lam * network.jvp(x, some)
    f = network.outputs(x)
    with torch.no_grad():
        moved = torch.stack([network(objective.theta + lam * d, x) - f for d in some])
    apart, scale = (float(objective.team.over_draws(part.square().sum())) for part in (moved - linear, linear))
    return 0.0 if scale == 0 else (apart / scale) ** 0.5


def auto_lam(objective: Objective, penalty: Penalty) -> float:
    """The largest λ ≤ 0.1 at which the first guess keeps the network linear to 5 % (0.5 % in float64).

    The departure is first order in λ, so that one measurement tells the next try. Penalties without a start are probed
    along ∇r/δ, at least as long as A⁻¹∇r.
    """
    guess = penalty.start if penalty.start is not None else penalty.direction / _typical(objective.prior.precision)
    lam, allowed = _LARGEST_LAM, _LINEAR.get(objective.theta.dtype, 0.05)
    for _ in range(8):
        with objective.network.ledger.part("search for lam"):
            bend = nonlinearity(objective, guess, lam)
        if bend <= allowed:
            return lam
        lam *= min(0.5, _shrink(0.9 * allowed, bend))
    return max(lam, _SMALLEST_LAM)


def straighter_lam(objective: Objective, displacement: Tensor, lam: float) -> float:
    """λ, or a smaller one where the refits have left the linear region at it.

    What the data determine shrinks along the way, ‖JΔθ‖ with it, and what the data do not see stays as long as it was:
    so the departure, relative to ‖JΔθ‖, grows from the start to the end. It is first order in λ, and the displacement
    over λ is the same at any: a descent goes on from where it is. What is round-off grows as λ falls; there λ stays.
    """

    def bend(at: float) -> float:
        with objective.network.ledger.part("search for lam"):
            return nonlinearity(objective, displacement, at)

    bent = bend(lam)
    if bent <= _BENT:
        return lam
    lower = min(lam, max(_SMALLEST_LAM, lam * _shrink(_STRAIGHT, bent)))
    return lower if not bend(lower) >= bent else lam


def _shrink(wanted: float, bend: float) -> float:
    """The factor on λ; it does not go below 1e-3, also where the outputs were not finite."""
    return max(1e-3, wanted / bend) if bend < 1e3 else 1e-3


def _typical(prior_precision: Tensor) -> Tensor:
    positive = prior_precision[prior_precision > 0]
    return torch.where(prior_precision > 0, prior_precision, positive.mean() if len(positive) else 1.0)
