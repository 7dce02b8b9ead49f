"""SWAG: a Gaussian over weights from the iterates of SGD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad

from estimators.baselines.members import MembersEstimator
from estimators.data.batch import Batch
from estimators.errors import ConvergenceError, OptionError
from estimators.estimator.fit_report import PassReport
from estimators.likelihoods import Likelihood
from estimators.models.derivative_routes import BY_IDENTITY
from estimators.models.kernels import differentiable
from estimators.models.subsets import SubsetSpec
from estimators.numerics.pytrees import PyTree
from estimators.numerics.reductions import is_finite
from estimators.objective.objective import Objective
from estimators.option_checks import checked_instance, checked_integer, checked_number, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.rng import member_seeds
from estimators.training.learning_rate import auto_learning_rate
from estimators.training.recipe import Recipe
from estimators.training.training import fit_weights

__all__ = ["SWAG", "Iterates"]

DEFAULT_RECIPE = Recipe(epochs=40, batch_size=64, optimizer="sgd", lr="auto", schedule="constant")


class SWAG(MembersEstimator):
    """Stochastic weight averaging, Gaussian (Maddox et al. 2019, Algorithm 1).

        θ_0 = θ̂, θ_t = the iterate after t epochs of SGD at a constant rate, θ̄_t = mean of θ_0 ... θ_t
        Σ = ½ diag(mean θ² − θ̄²) + ½ D Dᵀ / (K−1),   D = the last K of θ_t − θ̄_t,   θ_s ~ N(θ̄_T, Σ), s = 1 ... S

    It descends on L itself, with the prior, over the chosen weights. Unlike in the paper, dropout is off and the
    statistics of a BatchNorm are frozen, as everywhere here: they are not estimated again for a sample.

    Args:
        recipe: SGD at a constant rate (for the mean loss L/N), T epochs; the rate sets the size of Σ. lr="auto" is
            `step` over the largest curvature of L/N that some batches show.
        step: see there; descent bears about 2 without momentum, 4 with one of 0.9.
        max_rank: K >= 2, or T where that is less.
        n_samples: S >= 2 networks.
        seed: of the order of the rows and of the samples.

    Fitted: `iterates_` (moments, deviations), `fit_report_`.
    Errors: OptionError for a recipe that is not such; ConvergenceError where it diverges.
    """

    retrains = True

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: float | Mapping[str, float] = 1.0,
        prior_mean: float = 0.0,
        subset_of_weights: SubsetSpec = "all",
        recipe: Recipe = DEFAULT_RECIPE,
        step: float = 1.0,
        max_rank: int = 20,
        n_samples: int = 30,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            subset_of_weights=subset_of_weights,
        )
        self.recipe = checked_instance("recipe", recipe, Recipe, remedy=f"{DEFAULT_RECIPE}.")
        self.step = checked_number("step", step, above=0, remedy="1.")
        _refuse_other_descents(self.recipe, self.step)
        self.max_rank = checked_integer("max_rank", max_rank, at_least=2)
        self.n_samples, self.seed = checked_integer("n_samples", n_samples, at_least=2), checked_seed(seed)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        self.iterates_ = Iterates(objective.theta, self.max_rank)
        objective.network.routes.swap = BY_IDENTITY  # no use of a weight is missed, whatever the inputs
        objective.check_displaced()

        def gradient(theta: Tensor, batch: Batch) -> Tensor:
            targets, share = objective.data_term.targets(objective.network, batch), objective.share(batch)
            with differentiable(), objective.network.pass_counter.transformed(backward=1):
                slope: Tensor = grad(objective.batch_loss)(theta, batch.x, targets, share)
            return slope.detach()

        with objective.network.pass_counter.phase("training"):
            fit_weights(
                objective.theta,
                gradient,
                objective.batches,
                recipe=self._with_rate(objective),
                generator=torch.Generator().manual_seed(self.seed),
                epoch_callback=self.iterates_.add,
                progress_bar=progress_bar,
            )
        self.fit_report_ = PassReport.of(objective)

    def _with_rate(self, objective: Objective) -> Recipe:
        recipe = self.recipe.resolve(objective.batches.n_data)
        if recipe.lr != "auto":
            return recipe
        largest = auto_learning_rate(objective.centred(curvature="ggn"), recipe, seed=self.seed)
        return replace(recipe, lr=self.step * largest)

    def _learned(self) -> Learned:
        return self.iterates_.tensors(), {**super()._learned()[1], "count": self.iterates_.count}

    def _restore(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        super()._restore(objective, tensors, learned)
        objective.network.routes.swap = BY_IDENTITY
        self.iterates_ = Iterates.restored(tensors, learned["count"], self.max_rank)

    def _members(self, x: PyTree) -> Tensor:
        seeds = member_seeds(self.seed, self.n_samples)
        with torch.no_grad():
            return torch.stack([self.network_(self.iterates_.sample(seed), x) for seed in seeds])


class Iterates:
    """Mean, diagonal variance and last deviations of vectors θ (P,) that come one by one, the first at the start."""

    def __init__(self, start: Tensor, max_rank: int) -> None:
        self.max_rank, self.count = max_rank, 1
        self.mean, self.squares = start.clone(), torch.zeros_like(start)  # squares: Σ (θ_t − mean)²
        self.deviations: list[Tensor] = []

    def add(self, theta: Tensor) -> float:
        """Enter an iterate; it asks for the rate that there was. Errors: ConvergenceError where it is not finite."""
        if not is_finite(theta):
            raise ConvergenceError(
                "an SGD whose iterates are finite",
                received=f"NaN or Inf after {self.count} epochs",
                remedy="a smaller lr.",
            )
        self.count += 1
        before = theta - self.mean
        self.mean = self.mean + before / self.count
        self.squares = self.squares + before * (theta - self.mean)  # mean θ² − θ̄² would cancel
        self.deviations = [*self.deviations, theta - self.mean][-self.max_rank :]
        return 1.0

    @property
    def diagonal(self) -> Tensor:
        """mean θ² − θ̄², (P,)."""
        return self.squares / self.count

    def covariance(self) -> Tensor:
        """Σ (P, P), for small P."""
        columns = torch.stack(self.deviations)
        return 0.5 * self.diagonal.diag() + 0.5 * columns.T @ columns / (len(columns) - 1)

    def sample(self, seed: int) -> Tensor:
        """θ_s (P,): θ̄ + √(½ diagonal) z₁ + D z₂ / √(2(K−1)), the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        k = len(self.deviations)
        z = torch.randn(len(self.mean) + k, generator=generator, dtype=self.mean.dtype).to(self.mean.device)
        theta = self.mean + (0.5 * self.diagonal).sqrt() * z[k:]
        for weight, column in zip(z[:k], self.deviations, strict=True):
            theta = theta + weight / math.sqrt(2 * (k - 1)) * column
        return theta

    def tensors(self) -> dict[str, Tensor]:
        """What `restored` needs, beside the count."""
        return {"mean": self.mean, "squares": self.squares, "deviations": torch.stack(self.deviations)}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], count: int, max_rank: int) -> Iterates:
        """From `tensors`."""
        iterates = cls(tensors["mean"], max_rank)
        iterates.count, iterates.squares = count, tensors["squares"]
        iterates.deviations = list(tensors["deviations"])
        return iterates


def _refuse_other_descents(recipe: Recipe, step: float) -> None:
    plain = recipe.optimizer in ("sgd", "nesterov") and recipe.schedule == "constant" and recipe.average == 0
    enough = isinstance(recipe.epochs, str) or recipe.epochs >= 2
    if not (plain and enough):
        raise OptionError(
            'SGD at a constant rate: optimizer "sgd" or "nesterov", schedule="constant", average=0, at least 2 epochs',
            received=repr(recipe),
            remedy=f"{DEFAULT_RECIPE}.",
        )
    if step != 1 and recipe.lr != "auto":
        raise OptionError("step=1 where the recipe has a number for lr", received=repr(step), remedy='lr="auto".')
