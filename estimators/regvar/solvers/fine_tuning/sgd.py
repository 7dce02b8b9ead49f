"""SGD refits of all perturbed copies, with learning-rate reductions when the objective increases."""

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

_MAX_INCREASE = 0.05  # of the decrease of F so far; more counts as an increase
_DIVERGED = 10.0  # times |F| at the start; above, copies are reset
_REDUCTION, _MAX_REDUCTIONS = 1 / 2, 12  # factor on the learning rate, and how often it is applied
_SELECT_AGAIN_AT = (1, 4)  # epochs after which λ is selected again


class SGDRefits:
    """SGD on perturbed copies, which measures the objective F at the iterates and reduces the learning rate.

    For a centred objective F is nearly quadratic, ∇F = A D − s∇r, so that gradients alone give its value,
    F = ½ Dᵀ(∇F − s∇r), without the difference of two nearly equal losses. Momentum and minibatch noise can make F
    increase, slowly, at rates that are stable on every single batch; this is visible after some epochs. With
    `selects_lam`, λ is selected again after the first and the fourth epoch, at the copies' displacements by then.
    """

    def __init__(self, copies: PerturbedCopies, recipe: Recipe, *, selects_lam: bool = False) -> None:
        self.copies, self.recipe, self.selects_lam = copies, recipe, selects_lam
        self.epochs = self.n_reductions = 0
        self._at_start = float("nan")
        self._lowest: float | None = None
        self._value = self._dimension = copies.signs.new_zeros(()).double()
        self.a_norm_error: float | None = None
        self._from_prior: Tensor | None = None

    def with_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint of the training loop, extended by the state of the refits."""
        return _WithCheckpoint(self, checkpoint)

    def state(self) -> dict[str, Any]:
        """Return λ, the learning rate, the number of reductions and the values of F, in JSON types; after an epoch."""
        return {
            "lam": self.copies.lam,
            "lr": self.recipe.lr,
            "guarded_epochs": self.epochs,
            "n_reductions": self.n_reductions,
            "at_start": self._at_start,
            "lowest": self._lowest,
            "a_norm_error": self.a_norm_error,
        }

    def restore(self, values: dict[str, Any]) -> None:
        """Restore `state`, except λ and the learning rate."""
        self.epochs, self.n_reductions, self._at_start = (
            values[name] for name in ("guarded_epochs", "n_reductions", "at_start")
        )
        self._lowest, self.a_norm_error = values["lowest"], values["a_norm_error"]

    @property
    def rate(self) -> float:
        """The current learning rate."""
        assert not isinstance(self.recipe.lr, str)
        return self.recipe.lr * _REDUCTION**self.n_reductions

    def gradient(self, displacements: Tensor, batch: Batch) -> Tensor:
        """Return the batch's part of ∇F, (A, P)."""
        objective = self.copies.objective
        mine = objective.process_group.shard(batch)
        if mine is None:
            slope = torch.zeros_like(displacements)
        else:
            slope = self.copies.batch_gradient(
                displacements, mine, objective.data_term.targets(objective.network, mine)
            )
        slope = objective.process_group.sum_over_rows(slope)
        share = objective.share(batch)
        along, linear_terms = dots(displacements, slope).sum(), share * self._linear_terms(displacements).sum()
        value = 0.5 * (along - linear_terms)
        if math.isnan(self._at_start):
            self._at_start = float(objective.process_group.sum_over_draws(value) / share)  # from the first batch
        self._value = self._value + value
        self._dimension = self._dimension + along + linear_terms - share * self._prior(displacements)  # uᵀGu
        return slope

    def after_epoch(self, displacements: Tensor) -> float:
        """Callback after an epoch: return 1, or the factor on the learning rate if F increased; reset diverged copies.

        Raises:
            ConvergenceError: if F increases at every learning rate.
        """
        process_group = self.copies.objective.process_group
        value, dimension = (float(process_group.sum_over_draws(mine)) for mine in (self._value, self._dimension))
        self._value = self._dimension = torch.zeros_like(self._value)
        self.a_norm_error = self._a_norm_error(value, dimension)
        self.epochs += 1
        if value <= self._most:
            self._lowest = value if self._lowest is None else min(value, self._lowest)
            if self.selects_lam and self.epochs in _SELECT_AGAIN_AT:
                self._select_lam_again(displacements)
            return 1.0
        self.n_reductions += 1
        if self.n_reductions > _MAX_REDUCTIONS:
            raise ConvergenceError(
                "a learning rate at which the objective decreases",
                received=f"an increase at {self.rate:.3g} still",
                remedy="check that the model is trained and in float32 or float64; or solver=LinearResponse().",
            )
        diverged = not value <= _DIVERGED * abs(self._at_start)
        self._lowest = self._at_start if diverged else value
        if diverged:
            displacements.copy_(self.copies.initial_guess)
        return _REDUCTION

    def _select_lam_again(self, displacements: Tensor) -> None:
        """Select λ again at the first copy's displacement; displacements, gradients over λ and F do not depend on λ."""
        copies = self.copies
        self.copies = replace(copies, lam=select_lam(copies.objective, copies.perturbation, displacements[:1]))

    def _a_norm_error(self, value: float, dimension: float) -> float | None:
        """Return the A-norm error per dimension of the epoch's iterates, at no cost; None without posterior draws."""
        copies = self.copies
        if copies.perturbation.initial_guess is None or dimension <= 0:
            return None
        if self._from_prior is None:
            self._from_prior = prior_draw_norms(copies.perturbation, copies.objective.prior.precision)[1].mean()
        prior_norm = copies.objective.process_group.sum_over_draws(copies.signs.abs().sum() * self._from_prior)
        return (float(prior_norm) + 2 * value) / dimension

    @property
    def _most(self) -> float:
        """The value above which F counts as increased: a part of its decrease above the lowest value."""
        if self._lowest is None:
            return self._at_start + abs(self._at_start)
        return self._lowest + _MAX_INCREASE * max(abs(self._at_start), self._at_start - self._lowest)

    def _linear_terms(self, displacements: Tensor) -> Tensor:
        """Return s_a ∇r_aᵀD_a of each copy, (A,)."""
        direction, k = self.copies.perturbation.gradient, len(self.copies.perturbation.gradient)
        along = torch.cat([dots(displacements[a : a + 1], direction[a % k]) for a in range(len(displacements))])
        return self.copies.signs * along

    def _prior(self, displacements: Tensor) -> Tensor:
        """Return Σ δ D² over all copies."""
        delta = self.copies.objective.prior.precision
        return torch.stack([dots(d[None], d, delta)[0] for d in displacements]).sum()


@dataclass(frozen=True)
class _WithCheckpoint(Checkpoint):
    """The state of a training loop and of its refits, in one."""

    refits: SGDRefits
    inner: Checkpoint

    def load(self) -> Learned | None:
        saved = self.inner.load()
        if saved is not None:
            self.refits.restore(saved[1])
        return saved

    def save(self, state: Callable[[], Learned]) -> None:
        def both() -> Learned:
            tensors, values = state()
            return tensors, {**values, **self.refits.state()}

        self.inner.save(both)
