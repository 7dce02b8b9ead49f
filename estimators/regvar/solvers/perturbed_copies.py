"""Displaced copies of the network, each with its own r and its own multiple of λ, refitted side by side.

The variable is the displacement D = (θ − θ̂)/λ, not θ, so that float32 does not cancel:

    F_a(D) = [L(θ̂ + λD) − λ s_a r_a(θ̂ + λD)] / λ²        ∇F_a = [∇L − λ s_a ∇r_a]/λ        ∇²F_a = ∇²L − λ s_a ∇²r_a
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from estimators.data.batch import Batch
from estimators.models.kernels import differentiable
from estimators.numerics.pytrees import PyTree, select_rows
from estimators.numerics.vectorize import one_by_one, over_rows
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice
from estimators.regvar.perturbation import Perturbation
from estimators.runtime.pass_counter import PassCounter

__all__ = ["DIFFERENCES", "PerturbedCopies", "checked_difference"]

Value = Callable[[Tensor, PyTree, Tensor], Tensor]

DIFFERENCES = {
    "forward": "f(θ_λ) − f(θ̂): one arm, first order in λ",
    "central": "f(θ_λ) − f(θ_−λ): two arms, second order in λ",
    "control": "f(θ_λ) − f(θ_0): one arm each and one shared, which takes away what every refit drifts by",
}


@dataclass(frozen=True)
class PerturbedCopies:
    """A arms over K penalties: signs s (A,), the items of each arm, and λ."""

    objective: Objective
    perturbation: Perturbation
    lam: float
    difference: str
    signs: Tensor
    items: PyTree
    at_once: int | None = None

    @classmethod
    def of(
        cls,
        objective: Objective,
        perturbation: Perturbation,
        lam: float,
        *,
        difference: str,
        at_once: int | None = None,
    ) -> Self:
        """The arms that `difference` needs; `at_once` of them go through one vectorised call (None: all)."""
        k = len(perturbation.direction)
        ones = perturbation.direction.new_ones(k)
        signs = {"forward": ones, "central": torch.cat([ones, -ones]), "control": torch.cat([ones, ones[:1] * 0])}
        index = torch.arange(len(signs[difference]), device=ones.device) % k
        items = perturbation.items if len(index) == k else select_rows(perturbation.items, index)
        return cls(objective, perturbation, lam, difference, signs[difference], items, at_once)

    @property
    def start(self) -> Tensor:
        """First guesses (A, P): those of the penalties times the arms' signs, or zero."""
        guess, k = self.perturbation.start, len(self.perturbation.direction)
        if guess is None:
            return torch.zeros(len(self.signs), self.objective.theta.numel()).to(self.objective.theta)
        return self.signs[:, None] * guess[torch.arange(len(self.signs), device=guess.device) % k]

    def displacement(self, arms: Tensor) -> Tensor:
        """(A, P) -> (K, P): the difference over λ."""
        k = len(self.perturbation.direction)
        if self.difference == "forward":
            return arms
        return 0.5 * (arms[:k] - arms[k:]) if self.difference == "central" else arms[:k] - arms[k:]

    def batch_gradient(self, arms: Tensor, batch: Batch, targets: PyTree) -> Tensor:
        """The batch's part of ∇F, (A, P).

        Only what bends is differentiated: the slopes of the prior and of a linear r are added in place, since with
        millions of parameters every tensor of θ's size counts.
        """
        objective, a = self.objective, len(arms)
        slope, share = grad(self._bent(batch, targets)), objective.share(batch)

        def at(d: Tensor, item: PyTree, sign: Tensor) -> Tensor:
            found: Tensor = slope(torch.add(objective.theta, d, alpha=self.lam), item, sign)
            return found

        slopes = self._over_arms(at, batch, arms, self.items, self.signs, forward=a, backward=a)
        return self._with_quadratic(slopes.detach(), arms, share)

    def _bent(self, batch: Batch, targets: PyTree) -> Value:
        """The data's loss, and −λ s r where r is not linear, as a function of θ."""
        objective, perturbation, lam = self.objective, self.perturbation, self.lam
        share = objective.share(batch)

        def value(theta: Tensor, item: PyTree, sign: Tensor) -> Tensor:
            loss = objective.data_term.loss(objective.network, theta, batch.x, targets)
            if perturbation.linear:
                return loss
            return loss - lam * sign * perturbation.value(theta, item, batch.x, share)

        return value

    def _with_quadratic(self, slopes: Tensor, arms: Tensor, share: float) -> Tensor:
        """slopes/λ + B/N·δ(D + (θ̂ − θ₀)/λ), and −B/N·s u of a linear r; slopes (A, P) are overwritten."""
        prior, theta, k = self.objective.prior, self.objective.theta, len(self.perturbation.direction)
        centred = prior.mean is theta  # by `Objective.centred`
        pull = None if centred else share / self.lam * prior.precision * (theta - prior.mean)
        for a, slope in enumerate(slopes):
            slope.div_(self.lam).addcmul_(prior.precision, arms[a], value=share)
            if pull is not None:
                slope.add_(pull)
            if self.perturbation.linear and float(self.signs[a]) != 0:
                slope.sub_(self.perturbation.direction[a % k], alpha=share * float(self.signs[a]))
        return slopes

    def gradient(self, arms: Tensor) -> Tensor:
        """∇F at arms (A, P): (A, P)."""
        total = torch.zeros_like(arms)
        for batch, targets in self.objective.with_targets():
            total += self.batch_gradient(arms, batch, targets)
        return self.objective.process_group.total(total)

    def product(self, arms: Tensor, vectors: Tensor) -> Tensor:
        """∇²F at arms (A, P) times vectors (A, P), arm by arm."""
        total = torch.zeros_like(vectors)
        for batch, targets in self.objective.with_targets():
            bend, a = self._batch_product(self._batch_value(batch, targets)), len(arms)
            rows = (arms, self.items, self.signs, vectors)
            total += self._over_arms(bend, batch, *rows, forward=a, tangent=a, backward=2 * a).detach()
        return self.objective.process_group.total(total)

    def _over_arms(
        self, function: Callable[..., Tensor], batch: Batch, arms: Tensor, *rows: PyTree, **multiples: float
    ) -> Tensor:
        """`function` of each arm: vectorised, and compared with a loop at the first batch of its kind."""
        network, n_arms = self.objective.network, len(arms)
        if network.routes.copies_in_a_loop:
            return self._in_a_loop(function, (arms, *rows), multiples)
        with differentiable(), self._pass_counter.transformed(**multiples) as counted:
            found: Tensor = over_rows(counted(function), arms, *rows, chunk_size=self.at_once)
        if n_arms == 1 or not bool(arms.any()) or not network.check.is_new("copies", batch.x, len(rows), n_arms):
            return found
        with network.check.counted():
            looped = self._in_a_loop(function, (arms, *rows), multiples)
        apart, scale = float((looped.double() - found.double()).norm()), float(looped.double().norm())
        round_off = torch.finfo(looped.dtype).eps ** 0.5 * looped.numel() ** 0.5
        if apart <= network.check.tolerance() * max(scale, round_off):
            return found
        network.routes.copies_in_a_loop = True
        reason = f"differs from a loop by {apart:.2g}, where the norm is {scale:.2g}"
        network.check.give_up("displaced copies", "vmap over them", reason, instead="one at a time")
        return looped

    def _in_a_loop(
        self, function: Callable[..., Tensor], rows: tuple[PyTree, ...], multiples: dict[str, float]
    ) -> Tensor:
        with differentiable(), self._pass_counter.transformed(**multiples) as counted:
            looped: Tensor = one_by_one(counted(function), rows)
        return looped

    @property
    def _pass_counter(self) -> PassCounter:
        return self.objective.network.pass_counter

    @staticmethod
    def _batch_product(value: Value) -> Callable[[Tensor, PyTree, Tensor, Tensor], Tensor]:
        def one(d: Tensor, item: PyTree, sign: Tensor, v: Tensor) -> Tensor:  # v → H v, forward over reverse
            slope = partial(grad(value), item=item, sign=sign)
            try:
                image: Tensor = jvp(slope, (d,), (v,))[1]
            except NotImplementedError:  # an operation without forward mode: reverse over reverse, H being symmetric
                image = vjp(slope, d)[1](v)[0]
            return image

        return one

    def _batch_value(self, batch: Batch, targets: PyTree) -> Value:
        objective, perturbation, lam = self.objective, self.perturbation, self.lam
        share = objective.share(batch)

        def value(d: Tensor, item: PyTree, sign: Tensor) -> Tensor:
            theta = objective.theta + lam * d
            loss = objective.batch_loss(theta, batch.x, targets, share)
            return (loss - lam * sign * perturbation.value(theta, item, batch.x, share)) / lam**2

        return value


def checked_difference(difference: str) -> str:
    """One of DIFFERENCES."""
    return checked_choice("difference", difference, sorted(DIFFERENCES), remedy='"central".')
