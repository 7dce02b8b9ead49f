"""The nonlinearity of a refit, and the selection of λ between errors from nonlinearity and from round-off."""

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

__all__ = ["auto_lam", "nonlinearity", "select_lam"]

_SMALLEST = {torch.float64: 1e-8}  # elsewhere 1e-6
_FIRST_POWER, _LARGEST = -4, 0.1  # the power of ten that is tried first; the largest λ
_BATCHES, _MAX_PROBED = 4, 8  # batches that λ is selected on; displacements that the ratio is computed for
_LINEAR = {torch.float64: 0.005}  # elsewhere 0.05


def nonlinearity(objective: Objective, displacement: Tensor, lam: float) -> float:
    """Return the nonlinearity ratio ‖Δf − JΔθ‖ / ‖JΔθ‖ for Δθ = λ · displacement, (K, P).

    It is computed on the first batch, for at most 8 of the displacements; over all processes that share the draws.
    """
    network, x = objective.network, next(iter(objective.batches)).x
    some = displacement[:_MAX_PROBED]
    linear = lam * network.jvp(x, some)
    f = network.outputs(x)
    with torch.no_grad():
        moved = torch.stack([network(objective.theta + lam * d, x) - f for d in some])
    distance, scale = (
        float(objective.process_group.sum_over_draws(part.square().sum())) for part in (moved - linear, linear)
    )
    return 0.0 if scale == 0 else (distance / scale) ** 0.5


def auto_lam(objective: Objective, perturbation: Perturbation) -> float:
    """Select λ at the initial guess: by gradients for a centred objective, else by the outputs."""
    if objective.data_term.centred:
        return select_lam(objective, perturbation)
    with objective.network.pass_counter.phase("search for lam"):
        return _lam_of_outputs(objective, perturbation)


def select_lam(
    objective: Objective, perturbation: Perturbation, at: Tensor | None = None, step: Tensor | None = None
) -> float:
    """Select λ so that gradients of the first copy at D (1, P), on some batches, are nearest to their limit A D − ∇r.

    D None: the initial guess. With a step, the change of the gradients along it is compared with A · step. The error
    from nonlinearity decreases with λ, the error from round-off in ∇L, divided by λ, increases: ‖distance‖ is smallest
    between. Outputs that are linear to 5 % do not suffice with millions of parameters: D stays large in directions
    without data, and makes the small remaining gradient nonlinear (docs/math.md, section 6).
    """
    with objective.network.pass_counter.phase("search for lam"):
        probe = _Probe.of(objective, perturbation.select(slice(0, 1)), at, step)
        distance = cache(lambda power: probe.distance(math.pow(10, power)))
        smallest, largest = round(math.log10(_smallest(objective))), round(math.log10(_LARGEST))
        power = _FIRST_POWER
        for toward in (-1, 1):
            while smallest <= power + toward <= largest and distance(power + toward) < distance(power):
                power += toward
        if power in (smallest, largest):
            return math.pow(10, power)
        return math.pow(
            10, power + _parabola_minimum(*(math.log(max(distance(power + k), 1e-300)) for k in (-1, 0, 1)))
        )


def _parabola_minimum(below: float, here: float, above: float) -> float:
    """Return the minimum of the parabola through the values at −1, 0 and 1, clipped to ±½."""
    curvature = below - 2 * here + above
    return max(-0.5, min(0.5, 0.5 * (below - above) / curvature)) if curvature > 0 and math.isfinite(curvature) else 0.0


@dataclass(frozen=True)
class _Probe:
    """One copy at D (1, P), some batches with their targets, and their part of the limit A D − ∇r, or A · step."""

    single: PerturbedCopies
    batches: list[tuple[Batch, PyTree]]
    at: Tensor
    limit: Tensor
    step: Tensor | None = None

    @classmethod
    def of(
        cls, objective: Objective, perturbation: Perturbation, at: Tensor | None, step: Tensor | None = None
    ) -> Self:
        """Return the probe at D, at the initial guess, or along ∇r at the minimum of ½ DᵀA D − ∇rᵀD."""
        data, network, parts = objective.data_term, objective.network, islice(objective.batches, _BATCHES)
        batches = [(part, data.targets(network, part)) for part in objective.process_group.shards(parts)]
        share = objective.process_group.sum_over_rows(
            objective.theta.new_tensor(sum(objective.share(part) for part, _ in batches))
        )
        guess = (
            perturbation.initial_guess
            if perturbation.initial_guess is not None and bool(perturbation.initial_guess.any())
            else None
        )
        guessed = at is None and guess is None
        at = next(found for found in (at, guess, perturbation.gradient) if found is not None)
        moved = at if step is None else step
        image = torch.zeros_like(at)
        for batch, _ in batches:
            data.curvature_product(network, batch, moved, image)
        image = objective.process_group.sum_over_rows(image).addcmul_(share * objective.prior.precision, moved)
        if guessed:
            length = (share * dots(at, at) / dots(at, image)).to(at.dtype)
            at, image = at * length, image * length
        single = PerturbedCopies.of(objective, perturbation, 1.0, difference="forward", chunk_size=1)
        return cls(single, batches, at, image if step is not None else image - share * perturbation.gradient, step)

    def distance(self, lam: float) -> float:
        """Return ‖∇F(D) − (A D − ∇r)‖², or ‖∇F(D + step) − ∇F(D) − A · step‖², of the batches at λ."""
        single, slopes = replace(self.single, lam=lam), torch.zeros_like(self.limit)
        for batch, targets in self.batches:
            if self.step is None:
                slopes += single.batch_gradient(self.at, batch, targets)
            else:
                slopes += single.batch_gradient(self.at + self.step, batch, targets)
                slopes -= single.batch_gradient(self.at, batch, targets)
        slopes = single.objective.process_group.sum_over_rows(slopes).sub_(self.limit)
        found = float(dots(slopes, slopes))
        return found if math.isfinite(found) else math.inf


def _lam_of_outputs(objective: Objective, perturbation: Perturbation) -> float:
    """Return the largest λ ≤ 0.1 at which the initial guess keeps the outputs linear to 5 % (0.5 % in float64).

    The nonlinearity ratio is first order in λ, so that one measurement gives the next λ. Perturbations without an
    initial guess are probed along ∇r/δ, which is at least as long as A⁻¹∇r.
    """
    guess = (
        perturbation.initial_guess
        if perturbation.initial_guess is not None
        else perturbation.gradient / _typical(objective.prior.precision)
    )
    lam, allowed = _LARGEST, _LINEAR.get(objective.theta.dtype, 0.05)
    for _ in range(8):
        ratio = nonlinearity(objective, guess, lam)
        if ratio <= allowed:
            return lam
        lam *= min(0.5, max(1e-3, 0.9 * allowed / ratio)) if ratio < 1e3 else 1e-3
    return max(lam, _smallest(objective))


def _smallest(objective: Objective) -> float:
    """Return the smallest λ for the dtype."""
    return _SMALLEST.get(objective.theta.dtype, 1e-6)


def _typical(prior_precision: Tensor) -> Tensor:
    """Return δ, with its positive mean for parameters without a prior."""
    positive = prior_precision[prior_precision > 0]
    return torch.where(prior_precision > 0, prior_precision, positive.mean() if len(positive) else 1.0)
