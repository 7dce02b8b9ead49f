"""SWAG: a Gaussian over weights from the iterates of SGD."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.func import grad

from estimators.data.batch import Batch
from estimators.errors import ConvergenceError, OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.members import WeightMembersEstimator
from estimators.estimator.options import CommonOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.models.derivative_routes import BY_IDENTITY
from estimators.models.kernels import differentiable
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


class SWAG(WeightMembersEstimator):
    """Stochastic weight averaging, Gaussian (Maddox et al. 2019, Algorithm 1).

        θ_0 = θ̂, θ_t = the iterate after t epochs of SGD at a constant rate, θ̄_t = mean of θ_0 ... θ_t
        Σ = ½ diag(mean θ² − θ̄²) + ½ D Dᵀ / (K−1),   D = the last K of θ_t − θ̄_t,   θ_s ~ N(θ̄_T, Σ), s = 1 ... S

    SGD minimises L, including the prior, over the chosen weights. Unlike in the paper, dropout is off and the
    statistics of a BatchNorm are frozen, as in every estimator here; they are not estimated again for a sample.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.
        recipe: SGD with a constant learning rate (for the mean loss L/N) and T epochs. The rate determines the size of
            Σ. lr="auto" is `step` divided by the largest curvature of L/N in a few batches.
        step: the numerator of lr="auto". SGD is stable up to about 2 without momentum, and 4 with a momentum of 0.9.
        max_rank: K >= 2; T if that is smaller.
        n_samples: the number S >= 2 of networks.
        seed: the seed of the order of the rows and of the samples.

    Attributes:
        iterates_: the moments and deviations of the iterates.
        fit_report_: the passes of the fit.

    Raises:
        OptionError: for a recipe other than SGD with a constant rate. `fit` raises ConvergenceError if SGD diverges.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators.training import Recipe
        >>> recipe = Recipe(epochs=3, optimizer="sgd", lr=0.01, schedule="constant")
        >>> swag = SWAG(nn.Linear(3, 2), "regression", recipe=recipe, n_samples=5)
        >>> swag.fit([(torch.randn(8, 3), torch.randn(8, 2))]).member_outputs(torch.randn(4, 3)).shape
        torch.Size([5, 4, 2])
    """

    retrains = True

    @inherits_options(UncertaintyEstimator, CommonOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        recipe: Recipe = DEFAULT_RECIPE,
        step: float = 1.0,
        max_rank: int = 20,
        n_samples: int = 30,
        seed: int = 0,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, likelihood, **options)
        self.recipe = checked_instance("recipe", recipe, Recipe, remedy=f"{DEFAULT_RECIPE}.")
        self.step = checked_number("step", step, above=0, remedy="1.")
        _check_recipe(self.recipe, self.step)
        self.max_rank = checked_integer("max_rank", max_rank, at_least=2)
        self.n_samples, self.seed = checked_integer("n_samples", n_samples, at_least=2), checked_seed(seed)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        self.iterates_ = Iterates(objective.theta, self.max_rank)
        objective.network.routes.swap = BY_IDENTITY  # replaces every use of a weight, for all inputs
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
                recipe=self._resolved_recipe(objective),
                generator=torch.Generator().manual_seed(self.seed),
                epoch_callback=self.iterates_.add,
                progress_bar=progress_bar,
            )

    def _resolved_recipe(self, objective: Objective) -> Recipe:
        recipe = self.recipe.resolve(objective.batches.n_data)
        if recipe.lr != "auto":
            return recipe
        rate = auto_learning_rate(objective.centred(curvature="ggn"), recipe, seed=self.seed)
        return replace(recipe, lr=self.step * rate)

    def _get_fit_state(self) -> Learned:
        return self.iterates_.tensors(), {"count": self.iterates_.count}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        objective.network.routes.swap = BY_IDENTITY
        self.iterates_ = Iterates.restored(tensors, learned["count"], self.max_rank)

    def _member_weights(self) -> Iterator[Tensor]:
        return (self.iterates_.sample(seed) for seed in member_seeds(self.seed, self.n_samples))


class Iterates:
    """Running mean, diagonal variance and last deviations of iterates θ (P,), the first of which is the start."""

    def __init__(self, start: Tensor, max_rank: int) -> None:
        self.max_rank, self.count = max_rank, 1
        self.mean, self.squares = start.clone(), torch.zeros_like(start)  # squares: Σ (θ_t − mean)²
        self.deviations: list[Tensor] = []

    def add(self, theta: Tensor) -> float:
        """Add an iterate. Raises ConvergenceError if it is not finite.

        Returns 1, the factor of the learning rate: `fit_weights` calls this as its `epoch_callback`.
        """
        if not is_finite(theta):
            raise ConvergenceError(
                "an SGD whose iterates are finite",
                received=f"NaN or Inf after {self.count} epochs",
                remedy="a smaller lr.",
            )
        self.count += 1
        before = theta - self.mean
        self.mean = self.mean + before / self.count
        self.squares = self.squares + before * (theta - self.mean)  # Welford: mean θ² − θ̄² would cancel
        self.deviations = [*self.deviations, theta - self.mean][-self.max_rank :]
        return 1.0

    @property
    def diagonal(self) -> Tensor:
        """The diagonal variance mean θ² − θ̄², (P,)."""
        return self.squares / self.count

    def covariance(self) -> Tensor:
        """Return Σ (P, P), for small P."""
        columns = torch.stack(self.deviations)
        return 0.5 * self.diagonal.diag() + 0.5 * columns.T @ columns / (len(columns) - 1)

    def sample(self, seed: int) -> Tensor:
        """Return θ_s (P,) = θ̄ + √(½ diagonal) z₁ + D z₂ / √(2(K−1)), the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        k = len(self.deviations)
        z = torch.randn(len(self.mean) + k, generator=generator, dtype=self.mean.dtype).to(self.mean.device)
        theta = self.mean + (0.5 * self.diagonal).sqrt() * z[k:]
        for weight, column in zip(z[:k], self.deviations, strict=True):
            theta = theta + weight / math.sqrt(2 * (k - 1)) * column
        return theta

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors for `restored`."""
        return {"mean": self.mean, "squares": self.squares, "deviations": torch.stack(self.deviations)}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], count: int, max_rank: int) -> Iterates:
        """Return the iterates with these tensors and count."""
        iterates = cls(tensors["mean"], max_rank)
        iterates.count, iterates.squares = count, tensors["squares"]
        iterates.deviations = list(tensors["deviations"])
        return iterates


def _check_recipe(recipe: Recipe, step: float) -> None:
    plain = recipe.optimizer in ("sgd", "nesterov") and recipe.schedule == "constant" and recipe.average == 0
    enough = isinstance(recipe.epochs, str) or recipe.epochs >= 2
    if not (plain and enough):
        raise OptionError(
            'SGD with optimizer "sgd" or "nesterov", schedule="constant", average=0 and at least 2 epochs',
            received=repr(recipe),
            remedy=f"{DEFAULT_RECIPE}.",
        )
    if step != 1 and recipe.lr != "auto":
        raise OptionError("step=1 with a number as the lr of the recipe", received=repr(step), remedy='lr="auto".')
