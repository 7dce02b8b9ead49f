"""The state of a gradient descent between two steps: all that must be kept for it to go on in another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from estimators.data.batch import Batch
from estimators.errors import ConvergenceError
from estimators.numerics.reductions import is_finite
from estimators.persistence.state import Learned
from estimators.training.recipe import Recipe

__all__ = ["BatchGradient", "EpochCallback", "StopCriterion", "TrainerState"]

BatchGradient = Callable[[Tensor, Batch], Tensor]
EpochCallback = Callable[[Tensor], float]
"""Weights at the end of an epoch -> what to multiply the learning rate by; it may put the weights back, in place."""
StopCriterion = Callable[[Tensor, int], bool]
"""The result so far and its epochs -> whether that will do."""


class TrainerState:
    """Weights, optimizer, generator and counters; `recipe` is one for these N rows."""

    def __init__(self, weights: Tensor, recipe: Recipe, n_data: int, generator: torch.Generator) -> None:
        assert not isinstance(recipe.epochs, str)
        self.recipe, self.generator = recipe, generator
        self.parameter = nn.Parameter(weights.clone(), requires_grad=False)
        self.optimizer = recipe.make_optimizer(self.parameter)
        self.epochs, self.rows, self.total = 0, 0, recipe.epochs * n_data
        self.full = 0  # rows of a full batch
        self.scale = 1.0  # of the learning rate
        self.mean: Tensor | None = None
        self.averaged = 0  # iterates in the mean

    def step(self, gradient: BatchGradient, batch: Batch) -> None:
        """One step of the optimizer."""
        self.optimizer.param_groups[0]["lr"] = self.scale * self.recipe.learning_rate(self.rows / self.total)
        self.full = self.full or len(batch)
        slopes = [gradient(self.parameter.data, part) for part in batch.parts(self.recipe.micro_batch_size)]
        self.parameter.grad = sum(slopes[1:], slopes[0]) / self.full
        self.optimizer.step()
        self.rows += len(batch)
        if self.recipe.average > 0:
            self._average()

    def end_epoch(self, epoch_callback: EpochCallback | None) -> None:
        """Let `epoch_callback` judge the weights, or refuse those that are not finite. Errors: ConvergenceError."""
        self.epochs += 1
        if epoch_callback is None:
            self._check_finite()
        elif (factor := epoch_callback(self.parameter.data)) != 1:
            self.scale *= factor
            self.optimizer.state.clear()
            self.mean, self.averaged = None, 0

    @property
    def result(self) -> Tensor:
        """The last iterate, or the weighted mean of all."""
        return self.parameter.data if self.mean is None else self.mean

    def state(self) -> Learned:
        """At the end of an epoch."""
        moments = {f"optimizer/{name}": value for name, value in self.optimizer.state[self.parameter].items()}
        tensors = {"weights": self.parameter.data, "generator": self.generator.get_state()}
        tensors |= {name: value for name, value in moments.items() if isinstance(value, Tensor)}
        if self.mean is not None:
            tensors["mean"] = self.mean
        counters = {name: getattr(self, name) for name in ("epochs", "rows", "full", "scale", "averaged")}
        return tensors, counters

    def restore(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """From `state`."""
        device = self.parameter.device
        self.parameter.data.copy_(tensors["weights"])
        self.generator.set_state(tensors["generator"].cpu())
        moments = {n.removeprefix("optimizer/"): t for n, t in tensors.items() if n.startswith("optimizer/")}
        if moments:  # a step count of Adam stays where its optimizer keeps it
            self.optimizer.state[self.parameter] = {n: t.to(device) if t.ndim else t for n, t in moments.items()}
        self.mean = tensors["mean"].to(device) if "mean" in tensors else None
        for name in ("epochs", "rows", "full", "scale", "averaged"):
            setattr(self, name, counters[name])

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
                "a descent that stays finite",
                received=f"NaN or Inf with {self.recipe}",
                remedy="a smaller lr, or lower momentum.",
            )
