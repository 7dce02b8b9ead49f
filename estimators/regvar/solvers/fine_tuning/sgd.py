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
from estimators.regvar.a_norm_error import prior_energy
from estimators.regvar.solvers.fine_tuning.nonlinearity import straightest_lam
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies
from estimators.training.training import Recipe

__all__ = ["Descent"]

_CLIMB, _BLOWN_UP = 0.05, 10.0
_SLOWER, _MOST_CUTS = 1 / 2, 12
_LOOKED_AGAIN = (1, 4)


class Descent:
    """Replicas at the chosen λ, the recipe with its learning rate, and F at the iterates.

    For a centred objective F is nearly a parabola, ∇F = A D − s∇r, so that slopes alone tell its value,
    F = ½ Dᵀ(∇F − s∇r), without the difference of two losses that are alike to many digits. Momentum and the noise of
    batches can make it climb at rates that any one batch would bear, and slowly: that is seen after some epochs. Where
    it `chooses` λ, it looks again after the first and the fourth epoch, from where the replicas have come to.
    """

    def __init__(self, replicas: PerturbedCopies, recipe: Recipe, *, chooses: bool = False) -> None:
        self.replicas, self.recipe, self.chooses = replicas, recipe, chooses
        self.epochs = self.cuts = 0
        self._at_start = float("nan")
        self._lowest: float | None = None
        self._value = self._dimension = replicas.signs.new_zeros(()).double()
        self.energy: float | None = None
        self._from_prior: Tensor | None = None

    def keeping(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint of the loop, with what the descent itself goes by."""
        return _Kept(self, checkpoint)

    def state(self) -> dict[str, Any]:
        """λ, the learning rate, the cuts and the values so far, in JSON types; at the end of an epoch."""
        return {
            "lam": self.replicas.lam,
            "lr": self.recipe.lr,
            "watched": self.epochs,
            "cuts": self.cuts,
            "at_start": self._at_start,
            "lowest": self._lowest,
            "energy": self.energy,
        }

    def restore(self, values: dict[str, Any]) -> None:
        """From `state`, λ and the learning rate aside."""
        self.epochs, self.cuts, self._at_start = (values[name] for name in ("watched", "cuts", "at_start"))
        self._lowest, self.energy = values["lowest"], values["energy"]

    @property
    def rate(self) -> float:
        """The learning rate that is left."""
        assert not isinstance(self.recipe.lr, str)
        return self.recipe.lr * _SLOWER**self.cuts

    def gradient(self, arms: Tensor, batch: Batch) -> Tensor:
        """The batch's part of ∇F, (A, P)."""
        objective = self.replicas.objective
        mine = objective.process_group.part(batch)
        if mine is None:
            slope = torch.zeros_like(arms)
        else:
            slope = self.replicas.batch_gradient(arms, mine, objective.data_term.targets(objective.network, mine))
        slope = objective.process_group.total(slope)
        share = objective.share(batch)
        along, tilts = dots(arms, slope).sum(), share * self._tilts(arms).sum()
        value = 0.5 * (along - tilts)
        if math.isnan(self._at_start):
            self._at_start = float(objective.process_group.over_draws(value) / share)  # as one batch has it
        self._value = self._value + value
        self._dimension = self._dimension + along + tilts - share * self._prior(arms)  # uᵀGu
        return slope

    def watch(self, arms: Tensor) -> float:
        """After an epoch: 1, or the factor on the learning rate where F climbed; arms that blew up are put back.

        Errors: ConvergenceError where it climbs at every rate.
        """
        process_group = self.replicas.objective.process_group
        value, dimension = (float(process_group.over_draws(mine)) for mine in (self._value, self._dimension))
        self._value = self._dimension = torch.zeros_like(self._value)
        self.energy = self._energy(value, dimension)
        self.epochs += 1
        if value <= self._most:
            self._lowest = value if self._lowest is None else min(value, self._lowest)
            if self.chooses and self.epochs in _LOOKED_AGAIN:
                self._choose_again(arms)
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
            arms.copy_(self.replicas.start)
        return _SLOWER

    def _choose_again(self, arms: Tensor) -> None:
        """λ at where the first replica has come to; the displacement, the slopes over λ and F mean the same at any."""
        replicas = self.replicas
        self.replicas = replace(replicas, lam=straightest_lam(replicas.objective, replicas.perturbation, arms[:1]))

    def _energy(self, value: float, dimension: float) -> float | None:
        """Energy error per dimension of the epoch's iterates, without a pass; None where r are not posterior draws."""
        replicas = self.replicas
        if replicas.perturbation.start is None or dimension <= 0:
            return None
        if self._from_prior is None:
            self._from_prior = prior_energy(replicas.perturbation, replicas.objective.prior.precision)[1].mean()
        of_arms = replicas.objective.process_group.over_draws(replicas.signs.abs().sum() * self._from_prior)
        return (float(of_arms) + 2 * value) / dimension

    @property
    def _most(self) -> float:
        """The value from which it climbs: a share of what it fell above the lowest; twice the start's at first."""
        if self._lowest is None:
            return self._at_start + abs(self._at_start)
        return self._lowest + _CLIMB * max(abs(self._at_start), self._at_start - self._lowest)

    def _tilts(self, arms: Tensor) -> Tensor:
        """s_a ∇r_aᵀD_a, (A,)."""
        direction, k = self.replicas.perturbation.direction, len(self.replicas.perturbation.direction)
        along = torch.cat([dots(arms[a : a + 1], direction[a % k]) for a in range(len(arms))])
        return self.replicas.signs * along

    def _prior(self, arms: Tensor) -> Tensor:
        """Σ δ D², of all arms."""
        delta = self.replicas.objective.prior.precision
        return torch.stack([dots(arm[None], arm, delta)[0] for arm in arms]).sum()


@dataclass(frozen=True)
class _Kept(Checkpoint):
    """The state of a loop and of its descent, in one."""

    descent: Descent
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
