"""Perturbed copies of the network (+λ, −λ), each with its own function r, refitted together.

The variable of copy a is the displacement D = (θ − θ̂)/λ, not θ, so that float32 does not cancel:

    F_a(D) = [L(θ̂ + λD) − λ s_a r_a(θ̂ + λD)] / λ²        ∇F_a = [∇L − λ s_a ∇r_a]/λ        ∇²F_a = ∇²L − λ s_a ∇²r_a
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.func import grad

from estimators.data.batch import Batch
from estimators.numerics.pytrees import PyTree, select_rows
from estimators.numerics.reductions import dots
from estimators.objective.objective import Objective
from estimators.objective.over_copies import over_copies
from estimators.option_checks import checked_choice
from estimators.regvar.perturbation import Perturbation

__all__ = ["DIFFERENCES", "PerturbedCopies", "checked_difference"]

Value = Callable[[Tensor, PyTree, Tensor], Tensor]

DIFFERENCES = {
    "forward": "(θ_λ − θ̂)/λ: one copy per function r, first order in λ",
    "central": "(θ_λ − θ_−λ)/2λ: two copies per function r, second order in λ",
}


@dataclass(frozen=True)
class PerturbedCopies:
    """The perturbed copies of the network for K functions r_k: K copies with +λ, and for "central" K with −λ.

    Args:
        objective: the objective, L.
        perturbation: the functions r_k.
        lam: λ.
        difference: a key of DIFFERENCES.
        signs: s_a, +1 or −1 per copy, (n_copies,).
        items: what distinguishes r_k from the other functions (`Perturbation.items`), per copy.
        chunk_size: copies in one vectorised call; None for all.
    """

    objective: Objective
    perturbation: Perturbation
    lam: float
    difference: str
    signs: Tensor
    items: PyTree
    chunk_size: int | None = None

    @classmethod
    def of(
        cls,
        objective: Objective,
        perturbation: Perturbation,
        lam: float,
        *,
        difference: str,
        chunk_size: int | None = None,
    ) -> Self:
        """Return the copies that `difference` needs, with `chunk_size` of them in one vectorised call (None: all)."""
        signs, items = perturbation.gradient.new_ones(len(perturbation.gradient)), perturbation.items
        if difference == "central":
            index = torch.arange(len(signs), device=signs.device).repeat(2)
            signs, items = torch.cat([signs, -signs]), select_rows(items, index)
        return cls(objective, perturbation, lam, difference, signs, items, chunk_size)

    @property
    def initial_guess(self) -> Tensor:
        """Initial displacements, (n_copies, P): the guess of the copy's r times its sign, or zero."""
        guess = self.perturbation.initial_guess
        if guess is None:
            return self.objective.theta.new_zeros(len(self.signs), self.objective.theta.numel())
        return torch.cat([guess, -guess]) if self.difference == "central" else guess

    def difference_quotient(self, displacements: Tensor) -> Tensor:
        """Return the finite difference u ≈ A⁻¹∇r_k, (K, P), of the copies' displacements, (n_copies, P)."""
        k = len(self.perturbation.gradient)
        if self.difference == "forward":
            return displacements
        return 0.5 * (displacements[:k] - displacements[k:])

    def signed_gradient_dots(self, displacements: Tensor) -> Tensor:
        """Return s_a ∇r_aᵀD_a of each copy, (n_copies,)."""
        k = len(self.perturbation.gradient)
        along = [dots(part, self.perturbation.gradient) for part in displacements.split(k)]
        return self.signs * torch.cat(along)

    def batch_gradient(self, displacements: Tensor, batch: Batch, targets: PyTree) -> Tensor:
        """Return the batch's part of ∇F at the displacements (n_copies, P), (n_copies, P).

        Only the nonlinear terms are differentiated. The gradients of the prior and of a linear r are added in place,
        since with millions of parameters each tensor of θ's size counts.
        """
        objective, a = self.objective, len(displacements)
        slope, share = grad(self._nonlinear_terms(batch, targets)), objective.share(batch)

        def at(d: Tensor, item: PyTree, sign: Tensor) -> Tensor:
            found: Tensor = slope(torch.add(objective.theta, d, alpha=self.lam), item, sign)
            return found

        slopes = self._over_copies(at, batch, displacements, self.items, self.signs, forward=a, backward=a)
        return self._with_quadratic(slopes.detach(), displacements, share)

    def _nonlinear_terms(self, batch: Batch, targets: PyTree) -> Value:
        """Return the data's loss, and −λ s r if r is not linear, as a function of θ."""
        objective, perturbation, lam = self.objective, self.perturbation, self.lam
        share = objective.share(batch)

        def value(theta: Tensor, item: PyTree, sign: Tensor) -> Tensor:
            loss = objective.data_term.loss(objective.network, theta, batch.x, targets)
            if perturbation.linear:
                return loss
            return loss - lam * sign * perturbation.value(theta, item, batch.x, share)

        return value

    def _with_quadratic(self, slopes: Tensor, displacements: Tensor, share: float) -> Tensor:
        """Return slopes/λ + (B/N) δ (D + (θ̂ − θ₀)/λ), less (B/N) s ∇r_k for a linear r; overwrites slopes.

        B/N, `share`, is the batch's share of the training rows.
        """
        prior, theta, k = self.objective.prior, self.objective.theta, len(self.perturbation.gradient)
        centred = prior.mean is theta  # set by `Objective.centred`
        pull = None if centred else share / self.lam * prior.precision * (theta - prior.mean)
        for a, slope in enumerate(slopes):
            slope.div_(self.lam).addcmul_(prior.precision, displacements[a], value=share)
            if pull is not None:
                slope.add_(pull)
            if self.perturbation.linear:
                slope.sub_(self.perturbation.gradient[a % k], alpha=share * float(self.signs[a]))
        return slopes

    def _over_copies(
        self, function: Callable[..., Tensor], batch: Batch, displacements: Tensor, *rows: PyTree, **multiples: float
    ) -> Tensor:
        """Return `function` of each copy; `multiples` are its forward and backward passes, for the pass counter."""
        # A vectorised call is compared with a loop once the copies differ; before the first step all are equal.
        network, compared = self.objective.network, bool(displacements.any())
        inputs = (displacements, *rows)
        return over_copies(
            network, function, batch.x, *inputs, chunk_size=self.chunk_size, compared=compared, **multiples
        )


def checked_difference(difference: str) -> str:
    """Return `difference`, a key of DIFFERENCES, or raise OptionError."""
    return checked_choice("difference", difference, sorted(DIFFERENCES), remedy='"central".')
