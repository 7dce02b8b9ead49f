"""How to descend: epochs, batches, optimizer, rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from estimators.errors import OptionError
from estimators.option_checks import checked_choice, checked_integer, checked_number

__all__ = ["Recipe"]

_LEAST_EPOCHS, _LEAST_STEPS = 15, 240
_ROWS_A_STEP, _STEPS_AN_EPOCH = 64, 8
_OPTIMIZERS = ("sgd", "nesterov", "adam", "conjugate", "auto")
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,  # noqa: ARG005
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class Recipe:
    """How to descend. Learning rates are for the mean loss L/N, so that they do not depend on N.

    Args:
        epochs: passes over the rows, or "auto": 15, and more where they would be fewer than 240 steps.
        batch_size: rows a step, regrouped in a new order each epoch; None takes the loader's own batches as they come;
            "auto": 64, and fewer where an epoch would have fewer than 8 steps.
        optimizer: "sgd" (with `momentum`, a heavy ball), "nesterov" (with Nesterov's, stable at a rate of 1/L), or
            "adam"; in FineTune also "conjugate" (slopes of all rows, along conjugate directions, without a rate: an
            epoch is a step) or "auto", conjugate where the rows are few, and "nesterov". Weight decay is not an option:
            the prior is in the loss.
        lr: learning rate, or "auto" where the solver that uses the recipe can choose it (FineTune).
        schedule: "cosine" (to zero) or "constant".
        average: a > 0 averages the iterates (Polyak & Juditsky 1992) with weights growing as t^(2/a − 2), which are on
            average as old as the last share a of them (Shamir & Zhang 2013): one need not know where it ends. 0 for
            the last iterate. For a constant rate.
        micro_batch_size: rows in one forward and backward; the slopes of a step's parts are added (gradient accumulation).
            None: a step's rows at once. It does not affect the fit: a saved fit may be read with another value.
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
        """The rate after `progress` in [0, 1] of all rows."""
        assert not isinstance(self.lr, str)
        return self.lr * _SCHEDULES[self.schedule](progress)

    def resolve(self, n_data: int) -> Recipe:
        """The recipe with its rows a step and its number of epochs, for N rows."""
        size = self.batch_size
        if isinstance(size, str):
            size = min(_ROWS_A_STEP, math.ceil(n_data / _STEPS_AN_EPOCH))
        if not isinstance(self.epochs, str):
            return replace(self, batch_size=size)
        steps = math.ceil(n_data / (size or n_data))  # an epoch
        return replace(self, batch_size=size, epochs=max(_LEAST_EPOCHS, math.ceil(_LEAST_STEPS / steps)))

    def make_optimizer(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """The optimizer over one tensor. Errors: OptionError for "conjugate"."""
        if self.optimizer == "conjugate":
            raise OptionError("a stochastic optimizer", received='"conjugate"', remedy='"nesterov", "sgd" or "adam".')
        if self.optimizer == "adam":
            return torch.optim.Adam([parameter], lr=self.learning_rate(0.0))
        nesterov = self.optimizer in ("nesterov", "auto") and self.momentum > 0
        return torch.optim.SGD([parameter], lr=self.learning_rate(0.0), momentum=self.momentum, nesterov=nesterov)
