"""The state of a gradient descent between two steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from estimators.data.batch import Batch
from estimators.errors import ConvergenceError
from estimators.numerics.reductions import is_finite
from estimators.training.recipe import Recipe

__all__ = ["BatchGradient", "EpochCallback", "TrainerState"]

BatchGradient = Callable[[Tensor, Batch], Tensor]
EpochCallback = Callable[[Tensor], float]
"""Function of the weights after an epoch: the factor of the learning rate. It may reset the weights in place."""


class TrainerState:
    """Weights, optimizer, generator and counters of a training.

    Args:
        weights: initial weights, any shape.
        recipe: a recipe that is resolved for these N rows.
        n_data: N.
        generator: the generator of the order of rows.
    """

    def __init__(self, weights: Tensor, recipe: Recipe, n_data: int, generator: torch.Generator) -> None:
        assert not isinstance(recipe.epochs, str)
        self.recipe, self.generator = recipe, generator
        self.parameter = nn.Parameter(weights.clone(), requires_grad=False)
        self.optimizer = recipe.make_optimizer(self.parameter)
        self.rows, self.total = 0, recipe.epochs * n_data
        self.full = 0  # rows of a full batch
        self.scale = 1.0  # of the learning rate
        self.mean: Tensor | None = None
        self.averaged = 0  # iterates in the mean

    def step(self, gradient: BatchGradient, batch: Batch) -> None:
        """Take one step of the optimizer."""
        self.optimizer.param_groups[0]["lr"] = self.scale * self.recipe.learning_rate(self.rows / self.total)
        self.full = self.full or len(batch)
        slopes = [gradient(self.parameter.data, part) for part in batch.parts(self.recipe.micro_batch_size)]
        self.parameter.grad = sum(slopes[1:], slopes[0]) / self.full
        self.optimizer.step()
        self.rows += len(batch)
        if self.recipe.average > 0:
            self._average()

    def end_epoch(self, epoch_callback: EpochCallback | None) -> None:
        """Call the callback and apply its factor; without one, raise ConvergenceError if weights are not finite."""
        if epoch_callback is None:
            self._check_finite()
        elif (factor := epoch_callback(self.parameter.data)) != 1:
            self.scale *= factor
            self.optimizer.state.clear()
            self.mean, self.averaged = None, 0

    @property
    def result(self) -> Tensor:
        """The last iterate, or the weighted mean of all iterates."""
        return self.parameter.data if self.mean is None else self.mean

    def _average(self) -> None:
        self.averaged += 1
        power = 2 / self.recipe.average - 2
        if self.mean is None:
            self.mean = self.parameter.data.clone()
        else:  # weights Γ(t + power)/Γ(t), about t^power
            self.mean.lerp_(self.parameter.data, (power + 1) / (self.averaged + power))

    def _check_finite(self) -> None:
        if not is_finite(self.parameter):
            raise ConvergenceError(
                "a training that stays finite",
                received=f"NaN or Inf with {self.recipe}",
                remedy="a smaller lr, or lower momentum.",
            )
