"""λ: where a refit is nearest to the linear response, between what the network bends and what round-off takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Self

import torch
from torch import Tensor

from estimators.data.batch import Batch
from estimators.numerics.pytrees import PyTree
from estimators.numerics.reductions import dots
from estimators.objective.objective import Objective
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies

__all__ = ["auto_lam", "nonlinearity", "straightest_lam"]

_SMALLEST = {torch.float64: 1e-8}  # elsewhere 1e-6
_BEGIN, _LARGEST = -4, 0.1  # the power of ten that is tried first; the largest λ
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
    apart, scale = (float(objective.process_group.over_draws(part.square().sum())) for part in (moved - linear, linear))
    return 0.0 if scale == 0 else (apart / scale) ** 0.5


def auto_lam(objective: Objective, perturbation: Perturbation) -> float:
    """λ for a centred objective by its slopes at the first guess, for another by its outputs there."""
    if objective.data_term.centred:
        return straightest_lam(objective, perturbation)
    with objective.network.pass_counter.phase("search for lam"):
        return _lam_of_outputs(objective, perturbation)


def straightest_lam(
    objective: Objective, perturbation: Perturbation, at: Tensor | None = None, step: Tensor | None = None
) -> float:
    """λ at which slopes of the first replica at D (1, P), on some batches, are nearest to their limit A D − ∇r.

    None: at its first guess. With a step, what they change by along it is compared, with A · step. What the network
    bends falls with λ, and round-off in ∇L, divided by λ, grows: the least of ‖apart‖ lies between. Outputs that are
    linear to 5 % are not enough with millions of parameters: D stays large where the data say nothing, and bends what
    they see of it, which becomes small (docs/math.md, section 6).
    """
    with objective.network.pass_counter.phase("search for lam"):
        probe = _Probe.of(objective, perturbation.part(slice(0, 1)), at, step)
        apart = cache(lambda power: probe.apart(math.pow(10, power)))
        smallest, largest = round(math.log10(_smallest(objective))), round(math.log10(_LARGEST))
        power = _BEGIN
        for toward in (-1, 1):
            while smallest <= power + toward <= largest and apart(power + toward) < apart(power):
                power += toward
        if power in (smallest, largest):
            return math.pow(10, power)
        return math.pow(10, power + _least(*(math.log(max(apart(power + k), 1e-300)) for k in (-1, 0, 1))))


def _least(below: float, here: float, above: float) -> float:
    """Where the parabola through −1, 0 and 1 is least, within ½."""
    bend = below - 2 * here + above
    return max(-0.5, min(0.5, 0.5 * (below - above) / bend)) if bend > 0 and math.isfinite(bend) else 0.0


@dataclass(frozen=True)
class _Probe:
    """A replica at D (1, P), some batches with their targets, and their part of the limit A D − ∇r, or A · step."""

    replica: PerturbedCopies
    batches: list[tuple[Batch, PyTree]]
    at: Tensor
    limit: Tensor
    step: Tensor | None = None

    @classmethod
    def of(
        cls, objective: Objective, perturbation: Perturbation, at: Tensor | None, step: Tensor | None = None
    ) -> Self:
        """At D, the penalty's first guess, or as far along ∇r as ½ DᵀA D − ∇rᵀD falls."""
        data, network, parts = objective.data_term, objective.network, islice(objective.batches, _BATCHES)
        batches = [(part, data.targets(network, part)) for part in objective.process_group.parts(parts)]
        share = objective.process_group.total(
            objective.theta.new_tensor(sum(objective.share(part) for part, _ in batches))
        )
        guess = perturbation.start if perturbation.start is not None and bool(perturbation.start.any()) else None
        guessed = at is None and guess is None
        at = next(found for found in (at, guess, perturbation.direction) if found is not None)
        moved = at if step is None else step
        image = torch.zeros_like(at)
        for batch, _ in batches:
            data.curvature_product(network, batch, moved, image)
        image = objective.process_group.total(image).addcmul_(share * objective.prior.precision, moved)
        if guessed:
            length = (share * dots(at, at) / dots(at, image)).to(at.dtype)
            at, image = at * length, image * length
        replica = PerturbedCopies.of(objective, perturbation, 1.0, difference="forward", at_once=1)
        return cls(replica, batches, at, image if step is not None else image - share * perturbation.direction, step)

    def apart(self, lam: float) -> float:
        """‖∇F(D) − (A D − ∇r)‖², or ‖∇F(D + step) − ∇F(D) − A · step‖², of the batches at λ."""
        replica, slopes = replace(self.replica, lam=lam), torch.zeros_like(self.limit)
        for batch, targets in self.batches:
            if self.step is None:
                slopes += replica.batch_gradient(self.at, batch, targets)
            else:
                slopes += replica.batch_gradient(self.at + self.step, batch, targets)
                slopes -= replica.batch_gradient(self.at, batch, targets)
        slopes = replica.objective.process_group.total(slopes).sub_(self.limit)
        found = float(dots(slopes, slopes))
        return found if math.isfinite(found) else math.inf


def _lam_of_outputs(objective: Objective, perturbation: Perturbation) -> float:
    """The largest λ ≤ 0.1 at which the first guess keeps the outputs linear to 5 % (0.5 % in float64).

    Their departure is first order in λ, so that one measurement tells the next try. Penalties without a start are
    probed along ∇r/δ, at least as long as A⁻¹∇r.
    """
    guess = (
        perturbation.start
        if perturbation.start is not None
        else perturbation.direction / _typical(objective.prior.precision)
    )
    lam, allowed = _LARGEST, _LINEAR.get(objective.theta.dtype, 0.05)
    for _ in range(8):
        bend = nonlinearity(objective, guess, lam)
        if bend <= allowed:
            return lam
        lam *= min(0.5, max(1e-3, 0.9 * allowed / bend)) if bend < 1e3 else 1e-3
    return max(lam, _smallest(objective))


def _smallest(objective: Objective) -> float:
    return _SMALLEST.get(objective.theta.dtype, 1e-6)


def _typical(prior_precision: Tensor) -> Tensor:
    positive = prior_precision[prior_precision > 0]
    return torch.where(prior_precision > 0, prior_precision, positive.mean() if len(positive) else 1.0)
