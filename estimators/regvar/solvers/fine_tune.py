"""FineTune: minibatch refits at a finite λ, for networks of any size."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from estimators.data.batch import Batch
from estimators.errors import ConvergenceError, LambdaTooLargeError, OptionError
from estimators.numerics.reductions import dots
from estimators.objective.objective import Objective
from estimators.option_checks import checked_instance, checked_integer, checked_seed
from estimators.persistence.checkpoint import Checkpoint
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.solvers.base import Solution, Solver, SolverReport, checked_lam
from estimators.regvar.solvers.nonlinearity import nonlinearity, select_lam
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies, checked_difference
from estimators.training.learning_rate import auto_learning_rate
from estimators.training.training import Recipe, fit_weights

__all__ = ["DEFAULT_RECIPE", "FineTune"]

DEFAULT_RECIPE = Recipe(
    epochs="auto", batch_size="auto", optimizer="nesterov", lr="auto", momentum=0.95, schedule="constant", average=0.3
)
"""Measured in docs/math.md, section 6: momentum .95 and averaged iterates have the smallest error at equal passes."""
_MAX_NONLINEARITY = 0.5
"""Nonlinearity ratio at the end of a refit above which it raises; the ratio of saturating networks tends to 1."""
_MAX_VMAP_NUMBERS = 2**20
"""Weights of all copies in one vectorised call on a CPU: 8 times as fast as a loop at 3·10³ each, slower at 8·10⁵."""
_TOLERANCE = 0.05
"""Part of the decrease of F so far by which F may increase in an epoch, from the noise of the batches."""
_MAX_REDUCTIONS = 12
"""How often the learning rate is halved at most, to 1/4096: a rate that diverges still has another cause."""


class FineTune(Solver):
    """Refits argmin L − λ r by SGD at a finite λ; all perturbed copies see the same batches.

    Needs only plain gradients of a plain loss. For a centred objective with curvature "ggn" the network is trained on
    its own predictions. Posterior draws start at the prior draw, which is already the solution in directions without
    data. The answer is the average of the iterates. Memory is about eight vectors of θ's size per perturbed copy.

    Source: the finite-difference form of McInerney & Kallus, AISTATS 2025, Theorem 4.1, on a centred objective
    (docs/math.md, sections 3 and 6).

    Args:
        lam: λ > 0, or "auto": the largest λ ≤ 0.1 that keeps the network nearly linear at the start of the refit,
            ‖Δf − JΔθ‖ ≤ 0.01 ‖JΔθ‖. A refit that ends outside the linear region is done again with λ/8, and once more
            with λ/64.
        difference: "forward" (one perturbed copy per draw, error of first order in λ; enough for a centred objective)
            or "central" (two copies, second order).
        recipe: epochs, batch size and optimizer. lr="auto" is the inverse of the largest curvature of some batches; it
            is halved after each epoch in which the objective increases. epochs="auto": at least 15 epochs and 240
            steps.
        seed: seed of the order of the batches, the same for all copies.
        vmap_chunk_size: perturbed copies in one vectorised call, or "auto" (1 for convolutions on a CPU, where grouped
            convolutions are slow; else as many as memory allows). It does not affect the fit: a saved fit may be
            loaded with another value.

    Raises:
        OptionError: at construction, for options that are wrong or do not go together.
        LambdaTooLargeError: if the refit ends with a nonlinearity ratio above 0.5; with "auto", if all three do.
        ConvergenceError: if the weights diverge, with lr="auto" if the objective increases at every learning rate.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from estimators import FineTune, PosteriorDraws, RegVar
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = DataLoader(TensorDataset(x, x.sin()), batch_size=10)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> regvar = RegVar(model, "regression", regularizer=PosteriorDraws(32), solver=FineTune()).fit(loader)
        >>> regvar.variance(x[:3]).shape
        torch.Size([3, 1])
    """

    refits = True
    not_compared: ClassVar = frozenset({"vmap_chunk_size"})
    """Options that change the memory and the time of a fit, and its result by round-off only."""

    def __init__(
        self,
        lam: float | str = "auto",
        difference: str = "forward",
        recipe: Recipe = DEFAULT_RECIPE,
        *,
        seed: int = 0,
        vmap_chunk_size: int | str = "auto",
    ) -> None:
        self.lam, self.difference = checked_lam(lam, auto=True), checked_difference(difference)
        self.recipe = checked_instance("recipe", recipe, Recipe, remedy="Recipe(epochs=100).")
        self.seed = checked_seed(seed)
        self.vmap_chunk_size = checked_integer("vmap_chunk_size", vmap_chunk_size, at_least=1, words=("auto",))
        if recipe.lr == "auto" and recipe.optimizer == "adam":
            raise OptionError(
                'a number for lr with optimizer="adam"', received='"auto"', remedy='optimizer="nesterov", or lr=1e-3.'
            )

    def __repr__(self) -> str:
        return f"FineTune(lam={self.lam}, difference={self.difference!r}, epochs={self.recipe.epochs})"

    def _solve(
        self,
        objective: Objective,
        perturbation: Perturbation,
        *,
        progress_bar: bool,
        checkpoint: Checkpoint,  # noqa: ARG002
    ) -> Solution:
        if not isinstance(self.lam, str):
            return self._refit(objective, perturbation, self.lam, progress_bar=progress_bar)
        # λ small enough that the network is nearly linear between θ̂ and the start of the refit, which is θ̂ + λD.
        lam = select_lam(objective, perturbation)
        # At the end of the refit, JD may be much smaller than at the start, where the data have not restrained D yet.
        for smaller in (lam, lam / 8):
            with suppress(LambdaTooLargeError, ConvergenceError):
                return self._refit(objective, perturbation, smaller, progress_bar=progress_bar)
        return self._refit(objective, perturbation, lam / 64, progress_bar=progress_bar)

    def _refit(self, objective: Objective, perturbation: Perturbation, lam: float, *, progress_bar: bool) -> Solution:
        """Return the solution of a refit at one λ."""
        chunk_size = self.vmap_chunk_size if isinstance(self.vmap_chunk_size, int) else _default_chunk_size(objective)
        copies = PerturbedCopies.of(objective, perturbation, lam, difference=self.difference, chunk_size=chunk_size)
        recipe, refit = self._resolved_recipe(objective), _Refit(copies)
        # F is known from its gradients for a centred objective only; other refits are only checked for finite weights.
        monitored = self.recipe.lr == "auto" and objective.data_term.centred
        if monitored:
            refit.evaluate_start()
        # SGD on F(D) of all copies at once, from the prior draw or from 0; the result is the average of the iterates.
        displacements = fit_weights(
            copies.initial_guess,
            refit.gradient,
            objective.batches,
            recipe=recipe,
            generator=torch.Generator().manual_seed(self.seed),
            epoch_callback=refit.after_epoch if monitored else None,
            progress_bar=progress_bar,
        )
        # D is (θ(λ) − θ̂)/λ already, so that one copy per function is the finite difference u ≈ A⁻¹∇r.
        u = copies.difference_quotient(displacements)
        assert not isinstance(recipe.lr, str)
        report = SolverReport(
            repr(self),
            n_perturbations=len(perturbation.gradient),
            lam=lam,
            lr=recipe.lr / 2**refit.n_reductions,
            nonlinearity=_checked_nonlinearity(objective, u, lam),
        )
        return Solution(u, report)

    def _resolved_recipe(self, objective: Objective) -> Recipe:
        """Return the recipe with numbers in place of "auto"."""
        recipe = self.recipe.resolve(objective.batches.n_data)
        if recipe.lr == "auto":
            recipe = replace(recipe, lr=auto_learning_rate(objective, recipe, seed=self.seed))
        return recipe


class _Refit:
    """The gradients of an SGD refit, and the value of its objective F in each epoch, from these gradients alone.

    For a centred objective F(D) = ½ DᵀA D − s∇rᵀD up to O(λ), so that ∇F = A D − s∇r gives its value,

        F(D) = ½ Dᵀ(∇F − s∇r),

    at no cost and without the difference of two nearly equal losses. SGD with momentum may diverge slowly at a learning
    rate that is stable on every single batch, since the differences between batches act as multiplicative noise. This
    is visible in F after some epochs.
    """

    def __init__(self, copies: PerturbedCopies) -> None:
        self.copies, self.n_reductions = copies, 0
        self._value: Tensor | float = 0.0  # F in the current epoch: each batch's part at the iterate that saw it
        self._start, self._lowest = math.nan, math.inf  # F at the initial guess; lowest by epoch

    def evaluate_start(self) -> None:
        """Compute F at the initial guess by one pass: its batches differ in sign, so that none stands for all."""
        for batch in self.copies.objective.batches:
            self.gradient(self.copies.initial_guess, batch)
        self._start, self._value = float(self._value), 0.0

    def gradient(self, displacements: Tensor, batch: Batch) -> Tensor:
        """Return the batch's part of ∇F at the displacements (n_copies, P), (n_copies, P); processes share its rows."""
        objective = self.copies.objective
        mine = objective.process_group.shard(batch)
        if mine is None:
            slope = torch.zeros_like(displacements)
        else:
            targets = objective.data_term.targets(objective.network, mine)
            slope = self.copies.batch_gradient(displacements, mine, targets)
        slope = objective.process_group.sum_over_rows(slope)
        share = objective.share(batch)
        value = 0.5 * (dots(displacements, slope) - share * self.copies.signed_gradient_dots(displacements)).sum()
        self._value = self._value + value
        return slope

    def after_epoch(self, displacements: Tensor) -> float:
        """Return the factor of the learning rate: ½ if F increased in this epoch, else 1; reset diverged copies.

        Raises:
            ConvergenceError: if F exceeds its value at the start at every learning rate.
        """
        value, self._value = float(self._value), 0.0
        tolerance = _TOLERANCE * max(abs(self._start), self._start - self._lowest)
        diverged = not value <= self._start + abs(self._start)
        if value <= self._lowest + tolerance and not diverged:
            self._lowest = min(value, self._lowest)
            return 1.0
        if self.n_reductions == _MAX_REDUCTIONS and not diverged:
            return 1.0  # F has reached its minimum and varies with the batches
        self.n_reductions, self._lowest = self.n_reductions + 1, math.inf
        if self.n_reductions > _MAX_REDUCTIONS:
            raise ConvergenceError(
                "a learning rate at which the objective decreases",
                received=f"an increase still after {_MAX_REDUCTIONS} halvings",
                remedy="check that the model is trained and in float32 or float64; or solver=LinearResponse().",
            )
        if diverged:
            displacements.copy_(self.copies.initial_guess)
        return 0.5


def _checked_nonlinearity(objective: Objective, displacement: Tensor, lam: float) -> float:
    """Return ‖Δf − JΔθ‖/‖JΔθ‖ at the end of a refit, or raise LambdaTooLargeError if it is large."""
    with objective.network.pass_counter.phase("nonlinearity"):
        ratio = nonlinearity(objective, displacement, lam)
    if not ratio <= _MAX_NONLINEARITY:
        raise LambdaTooLargeError(
            f"refits in the linear region of the network, ‖Δf − JΔθ‖ ≤ {_MAX_NONLINEARITY} ‖JΔθ‖",
            received=f"a ratio of {ratio:.3g} at lam={lam:g}",
            remedy=f"a smaller lam such as {lam / 10:g}; or a smaller lr if the refit diverged.",
        )
    return ratio


def _default_chunk_size(objective: Objective) -> int:
    """Return the number of copies in one vectorised call: limited by memory, on a CPU by speed; 1 for convolutions."""
    modules, chunk_size = objective.network.module.modules(), objective.network.vectors_per_call
    if objective.theta.device.type != "cpu":
        return chunk_size
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in modules):
        return 1
    return min(chunk_size, max(1, _MAX_VMAP_NUMBERS // objective.theta.numel()))
