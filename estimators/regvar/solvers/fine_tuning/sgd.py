"""A descent of all replicas, which knows whether it goes down."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from estimators.data.batch import Batch
from estimators.errors import ConvergenceError
from estimators.numerics.reductions import dots
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned
from estimators.regvar.a_norm_error import prior_draw_norms
from estimators.regvar.solvers.fine_tuning.nonlinearity import select_lam
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies
from estimators.training.training import Recipe

__all__ = ["SGDRefits"]

_CLIMB, _BLOWN_UP = 0.05, 10.0
_SLOWER, _MOST_CUTS = 1 / 2, 12
_LOOKED_AGAIN = (1, 4)


class SGDRefits:
    """Replicas at the chosen λ, the recipe with its learning rate, and F at the iterates.

    For a centred objective F is nearly a parabola, ∇F = A D − s∇r, so that slopes alone tell its value,
    F = ½ Dᵀ(∇F − s∇r), without the difference of two losses that are alike to many digits. Momentum and the noise of
    batches can make it climb at rates that any one batch would bear, and slowly: that is seen after some epochs. Where
    it `chooses` λ, it looks again after the first and the fourth epoch, from where the replicas have come to.
    """

    def __init__(self, copies: PerturbedCopies, recipe: Recipe, *, chooses: bool = False) -> None:
        self.copies, self.recipe, self.chooses = copies, recipe, chooses
        self.epochs = self.cuts = 0
        self._at_start = float("nan")
        self._lowest: float | None = None
        self._value = self._dimension = copies.signs.new_zeros(()).double()
        self.a_norm_error: float | None = None
        self._from_prior: Tensor | None = None

    def keeping(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint of the loop, with what the descent itself goes by."""
        return _Kept(self, checkpoint)

    def state(self) -> dict[str, Any]:
        """λ, the learning rate, the cuts and the values so far, in JSON types; at the end of an epoch."""
        return {
            "lam": self.copies.lam,
            "lr": self.recipe.lr,
            "watched": self.epochs,
            "cuts": self.cuts,
            "at_start": self._at_start,
            "lowest": self._lowest,
            "a_norm_error": self.a_norm_error,
        }

    def restore(self, values: dict[str, Any]) -> None:
        """From `state`, λ and the learning rate aside."""
        self.epochs, self.cuts, self._at_start = (values[name] for name in ("watched", "cuts", "at_start"))
        self._lowest, self.a_norm_error = values["lowest"], values["a_norm_error"]

    @property
    def rate(self) -> float:
        """The learning rate that is left."""
        assert not isinstance(self.recipe.lr, str)
        return self.recipe.lr * _SLOWER**self.cuts

    def gradient(self, displacements: Tensor, batch: Batch) -> Tensor:
        """The batch's part of ∇F, (A, P)."""
        objective = self.copies.objective
        mine = objective.process_group.part(batch)
        if mine is None:
            slope = torch.zeros_like(displacements)
        else:
            slope = self.copies.batch_gradient(displacements, mine, objective.data_term.targets(objective.network, mine))
        slope = objective.process_group.total(slope)
        share = objective.share(batch)
        along, tilts = dots(displacements, slope).sum(), share * self._tilts(displacements).sum()
        value = 0.5 * (along - tilts)
        if math.isnan(self._at_start):
            self._at_start = float(objective.process_group.over_draws(value) / share)  # as one batch has it
        self._value = self._value + value
        self._dimension = self._dimension + along + tilts - share * self._prior(displacements)  # uᵀGu
        return slope

    def watch(self, displacements: Tensor) -> float:
        """After an epoch: 1, or the factor on the learning rate where F climbed; arms that blew up are put back.

        Errors: ConvergenceError where it climbs at every rate.
        """
        process_group = self.copies.objective.process_group
        value, dimension = (float(process_group.over_draws(mine)) for mine in (self._value, self._dimension))
        self._value = self._dimension = torch.zeros_like(self._value)
        self.a_norm_error = self._a_norm_error(value, dimension)
        self.epochs += 1
        if value <= self._most:
            self._lowest = value if self._lowest is None else min(value, self._lowest)
            if self.chooses and self.epochs in _LOOKED_AGAIN:
                self._choose_again(displacements)
            return 1.0
        self.cuts += 1
        if self.cuts > _MOST_CUTS:
            raise ConvergenceError(
                "a learning rate at which the objective falls",
                received=f"one that climbs at {self.rate:.3g} still",
                remedy="check that the model is trained and in float32 or float64; or solver=LinearResponse().",
            )
        blown_up = not value <= _BLOWN_UP * abs(self._at_start)
        self._lowest = self._at_start if blown_up else value
        if blown_up:
            displacements.copy_(self.copies.initial_guess)
        return _SLOWER

    def _choose_again(self, displacements: Tensor) -> None:
        """λ at where the first replica has come to; the displacement, the slopes over λ and F mean the same at any."""
        copies = self.copies
        self.copies = replace(copies, lam=select_lam(copies.objective, copies.perturbation, displacements[:1]))

    def _a_norm_error(self, value: float, dimension: float) -> float | None:
        """Energy error per dimension of the epoch's iterates, without a pass; None where r are not posterior draws."""
        copies = self.copies
        if copies.perturbation.initial_guess is None or dimension <= 0:
            return None
        if self._from_prior is None:
            self._from_prior = prior_draw_norms(copies.perturbation, copies.objective.prior.precision)[1].mean()
        of_arms = copies.objective.process_group.over_draws(copies.signs.abs().sum() * self._from_prior)
        return (float(of_arms) + 2 * value) / dimension

    @property
    def _most(self) -> float:
        """The value from which it climbs: a share of what it fell above the lowest; twice the start's at first."""
        if self._lowest is None:
            return self._at_start + abs(self._at_start)
        return self._lowest + _CLIMB * max(abs(self._at_start), self._at_start - self._lowest)

    def _tilts(self, displacements: Tensor) -> Tensor:
        """s_a ∇r_aᵀD_a, (A,)."""
        direction, k = self.copies.perturbation.gradient, len(self.copies.perturbation.gradient)
        along = torch.cat([dots(displacements[a : a + 1], direction[a % k]) for a in range(len(displacements))])
        return self.copies.signs * along

    def _prior(self, displacements: Tensor) -> Tensor:
        """Σ δ D², of all arms."""
        delta = self.copies.objective.prior.precision
        return torch.stack([dots(arm[None], arm, delta)[0] for arm in displacements]).sum()


@dataclass(frozen=True)
class _Kept(Checkpoint):
    """The state of a loop and of its descent, in one."""

    descent: SGDRefits
    inner: Checkpoint

    def load(self) -> Learned | None:
        saved = self.inner.load()
        if saved is not None:
            self.descent.restore(saved[1])
        return saved

    def save(self, state: Callable[[], Learned]) -> None:
        def both() -> Learned:
            tensors, values = state()
            return tensors, {**values, **self.descent.state()}

        self.inner.save(both)
