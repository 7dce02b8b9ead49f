"""Options of a gradient descent: epochs, batches, optimizer, learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from estimators.option_checks import checked_choice, checked_integer, checked_number

__all__ = ["Recipe"]

_MIN_EPOCHS, _MIN_STEPS = 15, 240
"""Lower bounds of epochs="auto"."""
_ROWS_PER_STEP, _STEPS_PER_EPOCH = 64, 8
"""batch_size="auto": at most these rows per step, and at least these steps per epoch."""
_OPTIMIZERS = ("sgd", "nesterov", "adam")
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,  # noqa: ARG005
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class Recipe:
    """Options of a gradient descent. Learning rates apply to the mean loss L/N, so that they do not depend on N.

    Args:
        epochs: passes over the rows, or "auto": at least 15 epochs and 240 steps.
        batch_size: rows per step, regrouped in a new order each epoch; None takes the batches of the loader;
            "auto": 64, or fewer so that an epoch has at least 8 steps.
        optimizer: "sgd" (heavy-ball momentum), "nesterov" (Nesterov momentum, stable at a rate of 1/L) or "adam".
            Weight decay is not an option: the prior is in the loss.
        lr: learning rate, or "auto" if the solver that uses the recipe can choose it (FineTune).
        momentum: momentum in [0, 1) of "sgd" and "nesterov".
        schedule: "cosine" (to zero) or "constant".
        average: a > 0 averages the iterates (Polyak & Juditsky 1992) with weights growing as t^(2/a − 2), whose
            mean age is that of the last fraction a of the iterates (Shamir & Zhang 2013). 0 returns the last
            iterate. Use it with a constant rate.
        micro_batch_size: rows per forward and backward pass; the gradients of a step are added over its micro-batches
            (gradient accumulation). None: all rows of a step. A saved fit may be loaded with another value.

    Raises:
        OptionError: a value is out of its range.

    Example:
        >>> Recipe(epochs="auto", optimizer="nesterov", lr=0.1).resolve(n_data=1000).epochs
        15
    """

    not_compared: ClassVar = frozenset({"micro_batch_size"})
    """Fields that change the memory of a fit, and its result by round-off only."""

    epochs: int | str = 100
    batch_size: int | str | None = 64
    optimizer: str = "adam"
    lr: float | str = 1e-2
    momentum: float = 0.9
    schedule: str = "cosine"
    average: float = 0.0
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        words: dict[str, tuple[str | None, ...]] = {
            "epochs": ("auto",),
            "batch_size": ("auto", None),
            "micro_batch_size": (None,),
        }
        for name, allowed in words.items():
            self._keep(name, checked_integer(name, getattr(self, name), at_least=1, words=allowed))
        checked_choice("optimizer", self.optimizer, _OPTIMIZERS, remedy='"nesterov", "sgd" or "adam".')
        checked_choice("schedule", self.schedule, sorted(_SCHEDULES), remedy='"cosine" or "constant".')
        self._keep("lr", checked_number("lr", self.lr, above=0, words=("auto",)))
        momentum = checked_number("momentum", self.momentum, at_least=0, below=1, remedy="0.9, or 0 for none.")
        self._keep("momentum", momentum)
        average = checked_number("average", self.average, at_least=0, at_most=1, remedy="0.5, or 0 for none.")
        self._keep("average", average)

    def _keep(self, name: str, value: object) -> None:
        """Store a checked value, a plain number, in the frozen field."""
        object.__setattr__(self, name, value)

    def learning_rate(self, progress: float) -> float:
        """Return the learning rate at some point of the training.

        Args:
            progress: the fraction of all rows that were seen, in [0, 1].

        Returns:
            The learning rate.
        """
        assert not isinstance(self.lr, str)
        return self.lr * _SCHEDULES[self.schedule](progress)

    def resolve(self, n_data: int) -> Recipe:
        """Return the recipe with numbers in place of "auto" for the batch size and the epochs.

        Args:
            n_data: N, the number of training rows.

        Returns:
            The resolved recipe.
        """
        size = self.batch_size
        if isinstance(size, str):
            size = min(_ROWS_PER_STEP, math.ceil(n_data / _STEPS_PER_EPOCH))
        if not isinstance(self.epochs, str):
            return replace(self, batch_size=size)
        steps = math.ceil(n_data / (size or n_data))  # per epoch
        return replace(self, batch_size=size, epochs=max(_MIN_EPOCHS, math.ceil(_MIN_STEPS / steps)))

    def make_optimizer(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """Make the optimizer of one tensor.

        Args:
            parameter: the tensor.

        Returns:
            A torch optimizer.
        """
        if self.optimizer == "adam":
            return torch.optim.Adam([parameter], lr=self.learning_rate(0.0))
        nesterov = self.optimizer == "nesterov" and self.momentum > 0
        return torch.optim.SGD([parameter], lr=self.learning_rate(0.0), momentum=self.momentum, nesterov=nesterov)
