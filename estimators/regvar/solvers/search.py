"""What FineTune chooses by itself: λ from the linearity of the start, the learning rate from curvatures of batches."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from estimators.batch import Batch
from estimators.objective import Objective
from estimators.regvar.penalty import Penalty
from estimators.training import Recipe, epoch

__all__ = ["auto_lam", "auto_learning_rate", "nonlinearity", "replicas_at_once"]

_LINEAR = {torch.float64: 0.005}  # elsewhere 0.05: float32 cannot afford a λ as small
_LARGEST_LAM, _SMALLEST_LAM = 0.1, 1e-6
_BATCHES, _POWER_STEPS = 4, 8
_PROBED = 8
_WORTH_A_VECTOR = 2**20  # numbers in all replicas: on a CPU 8 times as fast at 3·10³ parameters each, slower at 8·10⁵


def nonlinearity(objective: Objective, displacement: Tensor, lam: float) -> float:
    """‖Δf − JΔθ‖ / ‖JΔθ‖ for Δθ = λ · displacement (K, P), over the first batch and at most 8 of the displacements."""
    network, x = objective.network, next(iter(objective.batches)).x
    some = displacement[:_PROBED]
    linear = lam * network.jvp(x, some)
    f = network.outputs(x)
    with torch.no_grad():
        moved = torch.stack([network(objective.theta + lam * d, x) - f for d in some])
    scale = linear.norm()
    return float((moved - linear).norm() / scale) if float(scale) > 0 else 0.0


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
        shrink = 0.9 * allowed / bend if bend < 1e3 else 1e-3  # also where the outputs were not finite
        lam *= min(0.5, max(1e-3, shrink))
    return max(lam, _SMALLEST_LAM)


def _typical(prior_precision: Tensor) -> Tensor:
    positive = prior_precision[prior_precision > 0]
    return torch.where(prior_precision > 0, prior_precision, positive.mean() if len(positive) else 1.0)


def auto_learning_rate(objective: Objective, recipe: Recipe, *, seed: int) -> float:
    """1 / the largest curvature of the mean loss that some batches show: half of what plain descent would bear."""
    generator = torch.Generator().manual_seed(seed)
    batches = islice(epoch(objective.batches, recipe, generator), _BATCHES)
    v = torch.randn(objective.theta.numel(), generator=generator).to(objective.theta)
    with objective.network.ledger.part("search for lr"):
        largest = max(_largest_curvature(objective, batch, v) for batch in batches)
    return 1 / largest


def _largest_curvature(objective: Objective, batch: Batch, v: Tensor) -> float:
    """Power iteration on the batch's mean curvature plus δ/N."""
    prior = objective.prior.precision / objective.batches.n_data
    value = v.new_zeros(())
    for _ in range(_POWER_STEPS):
        v = v / v.norm()
        image = objective.data_term.curvature_product(objective.network, batch, v[None])[0] / len(batch) + prior * v
        value, v = image.norm(), image
    return float(value)


def replicas_at_once(objective: Objective) -> int:
    """Replicas in one vectorised call: bounded by memory; on a CPU by what is worth it, and one for convolutions."""
    modules, at_once = objective.network.module.modules(), objective.network.vectors_at_once
    if objective.theta.device.type != "cpu":
        return at_once
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in modules):
        return 1
    return min(at_once, max(1, _WORTH_A_VECTOR // objective.theta.numel()))
