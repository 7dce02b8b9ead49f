"""λ: where a refit is nearest to the linear response, between what the network bends and what round-off takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self

import torch
from torch import Tensor

from estimators.batch import Batch
from estimators.long_rows import dots
from estimators.objective import Objective
from estimators.pytrees import PyTree
from estimators.regvar.penalty import Penalty
from estimators.regvar.solvers.replicas import Replicas

__all__ = ["auto_lam", "nonlinearity"]

_SMALLEST = {torch.float64: 1e-8}  # elsewhere 1e-6
_LARGE, _LARGEST = 1e-2, 0.1
_BATCHES, _PROBED = 4, 8
_LINEAR = {torch.float64: 0.005}  # elsewhere 0.05


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
    """λ for a centred objective by its slopes, for another by its outputs.

    Of one replica at its first guess D, on some batches, ∇F(D) is compared with its limit A D − ∇r. What the network
    bends is first order in λ, and the round-off of ∇L, divided by λ, of order −1: ‖apart‖² = a λ² + c/λ², which is
    least at λ = (c/a)^¼. Outputs that are linear to 5 % are not enough with millions of parameters: D stays large where
    the data say nothing, and bends what they see of it, which becomes small (docs/math.md, section 6).
    """
    smallest = _SMALLEST.get(objective.theta.dtype, 1e-6)
    with objective.network.ledger.part("search for lam"):
        if not objective.data_term.centred:
            return _lam_of_outputs(objective, penalty, smallest)
        probe, small, large, lam = _Probe.of(objective, penalty.part(slice(0, 1))), smallest, _LARGE, smallest
        for _ in range(2):  # the second time from nearer to where it is least
            lam = min(_LARGEST, max(smallest, probe.between(small, large)))
            small, large = max(smallest, lam / 10), lam * 10
    return lam


@dataclass(frozen=True)
class _Probe:
    """A replica at D (1, P), some batches with their targets, and their part of the limit A D − ∇r."""

    replica: Replicas
    batches: list[tuple[Batch, PyTree]]
    at: Tensor
    limit: Tensor

    @classmethod
    def of(cls, objective: Objective, penalty: Penalty) -> Self:
        """At the penalty's first guess, or as far along ∇r as ½ DᵀA D − ∇rᵀD falls."""
        data, network, parts = objective.data_term, objective.network, islice(objective.batches, _BATCHES)
        batches = [(part, data.targets(network, part)) for part in objective.team.parts(parts)]
        share = objective.team.total(objective.theta.new_tensor(sum(objective.share(part) for part, _ in batches)))
        at = penalty.direction if penalty.start is None else penalty.start
        image = torch.zeros_like(at)
        for batch, _ in batches:
            data.curvature_product(network, batch, at, image)
        image = objective.team.total(image).addcmul_(share * objective.prior.precision, at)
        if penalty.start is None:
            step = share * dots(at, at) / dots(at, image)
            at, image = at * step, image * step
        replica = Replicas.of(objective, penalty, 1.0, difference="forward", at_once=1)
        return cls(replica, batches, at, image - share * penalty.direction)

    def apart(self, lam: float) -> float:
        """‖∇F(D) − (A D − ∇r)‖² of the batches at λ."""
        replica, total = replace(self.replica, lam=lam), -self.limit
        slopes = torch.zeros_like(total)
        for batch, targets in self.batches:
            slopes += replica.batch_gradient(self.at, batch, targets)
        total += replica.objective.team.total(slopes)
        return float(dots(total, total))

    def between(self, small: float, large: float) -> float:
        """Where a λ² + c/λ² through its values at two λ is least; infinite where nothing bends."""
        above = self.apart(large)
        while not math.isfinite(above) and large > 10 * small:
            large /= 10
            above = self.apart(large)
        at_small, at_large = self.apart(small) * small**2, above * large**2  # a λ⁴ + c
        bend = (at_large - at_small) / (large**4 - small**4)
        return (max(0.0, at_small - bend * small**4) / bend) ** 0.25 if bend > 0 else math.inf


def _lam_of_outputs(objective: Objective, penalty: Penalty, smallest: float) -> float:
    """The largest λ ≤ 0.1 at which the first guess keeps the outputs linear to 5 % (0.5 % in float64).

    Their departure is first order in λ, so that one measurement tells the next try. Penalties without a start are
    probed along ∇r/δ, at least as long as A⁻¹∇r.
    """
    guess = penalty.start if penalty.start is not None else penalty.direction / _typical(objective.prior.precision)
    lam, allowed = _LARGEST, _LINEAR.get(objective.theta.dtype, 0.05)
    for _ in range(8):
        bend = nonlinearity(objective, guess, lam)
        if bend <= allowed:
            return lam
        lam *= min(0.5, max(1e-3, 0.9 * allowed / bend)) if bend < 1e3 else 1e-3
    return max(lam, smallest)


def _typical(prior_precision: Tensor) -> Tensor:
    positive = prior_precision[prior_precision > 0]
    return torch.where(prior_precision > 0, prior_precision, positive.mean() if len(positive) else 1.0)
