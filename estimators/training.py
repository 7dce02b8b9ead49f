"""The one loop of stochastic gradient descent: for MAP networks, and for the minibatch refits of RegVar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from estimators.batches import Batch, Batches
from estimators.errors import ConvergenceError, OptionError
from estimators.likelihoods import Likelihood, resolve_likelihood
from estimators.network import output_tensor
from estimators.progress import track
from estimators.subsets import Subset, delta_of_names, matching_names

__all__ = ["Recipe", "fit_weights", "train_map"]

BatchGradient = Callable[[Tensor, Batch], Tensor]
Watch = Callable[[Tensor], float]
"""Weights at the end of an epoch -> what to multiply the learning rate by; it may put the weights back, in place."""

_LEAST_EPOCHS, _LEAST_STEPS = 16, 256
_ROWS_A_STEP, _STEPS_AN_EPOCH = 64, 8
_OPTIMIZERS = ("sgd", "adam")
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,  # noqa: ARG005
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class Recipe:
    """How to descend. Learning rates are for the mean loss L/N, so that they do not depend on N.

    Args:
        epochs: passes over the rows, or "auto": 16, and more where they would be fewer than 256 steps.
        batch_size: rows a step, regrouped in a new order each epoch; None takes the loader's own batches as they come;
            "auto": 64, and fewer where an epoch would have fewer than 8 steps.
        optimizer: "sgd" (with `momentum`) or "adam". Weight decay is not an option: the prior is in the loss.
        lr: learning rate, or "auto" where the solver that uses the recipe can choose it (FineTune).
        schedule: "cosine" (to zero) or "constant".
        average: the share of the last steps whose iterates are averaged (Polyak & Juditsky 1992), 0 for none; for a
            constant rate.
        rows_at_once: rows in one forward and backward; the slopes of a step's parts are added (gradient accumulation).
            None: a step's rows at once.
    """

    epochs: int | str = 100
    batch_size: int | str | None = 64
    optimizer: str = "adam"
    lr: float | str = 1e-2
    momentum: float = 0.9
    schedule: str = "cosine"
    average: float = 0.0
    rows_at_once: int | None = None

    def __post_init__(self) -> None:
        for name, words in (("epochs", ("auto",)), ("batch_size", ("auto", None)), ("rows_at_once", (None,))):
            value = getattr(self, name)
            if value not in words and (not isinstance(value, int) or value < 1):
                listed = " or ".join(map(repr, words))
                raise OptionError(f"{name} >= 1 or {listed}", received=repr(value), remedy="a positive whole number.")
        if self.optimizer not in _OPTIMIZERS:
            raise OptionError(
                f"optimizer among {_OPTIMIZERS}", received=repr(self.optimizer), remedy='"sgd" or "adam".'
            )
        if self.schedule not in _SCHEDULES:
            raise OptionError(
                f"schedule among {sorted(_SCHEDULES)}", received=repr(self.schedule), remedy='"cosine" or "constant".'
            )
        if not (self.lr == "auto" or (isinstance(self.lr, (int, float)) and math.isfinite(self.lr) and self.lr > 0)):
            raise OptionError('lr > 0 or "auto"', received=repr(self.lr), remedy="a positive number.")
        if not 0 <= self.momentum < 1:
            raise OptionError("momentum in [0, 1)", received=str(self.momentum), remedy="0.9, or 0 for none.")
        if not 0 <= self.average <= 1:
            raise OptionError("average in [0, 1]", received=str(self.average), remedy="0.5, or 0 for none.")

    def learning_rate(self, progress: float) -> float:
        """The rate after `progress` in [0, 1] of all rows."""
        assert not isinstance(self.lr, str)
        return self.lr * _SCHEDULES[self.schedule](progress)

    def for_rows(self, n_data: int) -> Recipe:
        """The recipe with its rows a step and its number of epochs, for N rows."""
        size = self.batch_size
        if isinstance(size, str):
            size = min(_ROWS_A_STEP, math.ceil(n_data / _STEPS_AN_EPOCH))
        if not isinstance(self.epochs, str):
            return replace(self, batch_size=size)
        steps = math.ceil(n_data / (size or n_data))  # an epoch
        return replace(self, batch_size=size, epochs=max(_LEAST_EPOCHS, math.ceil(_LEAST_STEPS / steps)))

    def build(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """The optimizer over one tensor."""
        if self.optimizer == "adam":
            return torch.optim.Adam([parameter], lr=self.learning_rate(0.0))
        return torch.optim.SGD([parameter], lr=self.learning_rate(0.0), momentum=self.momentum)


def fit_weights(
    weights: Tensor,
    gradient: BatchGradient,
    batches: Batches,
    *,
    recipe: Recipe,
    generator: torch.Generator,
    watch: Watch | None = None,
    progress_bar: bool = False,
) -> Tensor:
    """Descend from `weights` (any shape) along `gradient(weights, batch)`, the slope of the batch's part of the sum L.

    Slopes are divided by the rows of a full batch, so that a row weighs the same in a ragged last batch. Every entry
    sees the same batches, in the order drawn from `generator`: replicas stacked in `weights` differ in nothing else.
    Where `watch` lowers the rate, the momentum starts anew.
    Errors: ConvergenceError where the weights stop being finite.
    """
    recipe = recipe.for_rows(batches.n_data)
    assert not isinstance(recipe.epochs, str)
    parameter = nn.Parameter(weights.clone(), requires_grad=False)
    optimizer = recipe.build(parameter)
    rows, total, full, scale = 0, recipe.epochs * batches.n_data, 0, 1.0
    tail = _Mean()
    for _ in track(range(recipe.epochs), "epochs", shown=progress_bar):
        for batch in epoch(batches, recipe, generator):
            optimizer.param_groups[0]["lr"] = scale * recipe.learning_rate(rows / total)
            full = full or len(batch)
            slopes = [gradient(parameter.data, part) for part in batch.parts(recipe.rows_at_once)]
            parameter.grad = sum(slopes[1:], slopes[0]) / full
            optimizer.step()
            rows += len(batch)
            if rows > (1 - recipe.average) * total:
                tail.add(parameter.data)
        if watch is None:
            _refuse_divergence(parameter, recipe)
        elif (factor := watch(parameter.data)) != 1:
            scale *= factor
            optimizer.state.clear()
            tail = _Mean()
    return parameter.data if recipe.average == 0 or tail.mean is None else tail.mean


class _Mean:
    """Of the tensors added."""

    mean: Tensor | None = None
    count = 0

    def add(self, value: Tensor) -> None:
        self.count += 1
        self.mean = value.clone() if self.mean is None else self.mean.lerp_(value, 1 / self.count)


def epoch(batches: Batches, recipe: Recipe, generator: torch.Generator) -> Iterable[Batch]:
    """The batches of one epoch."""
    size = recipe.for_rows(batches.n_data).batch_size
    assert not isinstance(size, str)
    return batches if size is None else batches.shuffled(size, generator)


def _refuse_divergence(weights: Tensor, recipe: Recipe) -> None:
    if not bool(torch.isfinite(weights).all()):
        raise ConvergenceError(
            "a descent that stays finite",
            received=f"NaN or Inf with {recipe}",
            remedy="a smaller lr, or lower momentum.",
        )


def train_map(
    model: nn.Module,
    likelihood: str | Likelihood,
    train_loader: Iterable[Any],
    *,
    prior_precision: float | Mapping[str, float],
    recipe: Recipe | None = None,
    seed: int = 0,
    progress_bar: bool = False,
) -> nn.Module:
    """Train `model` in place to the maximum of log p(D|θ) − ½ Σ δ θ², sums over rows; it ends in eval mode.

    The rows are read once and regrouped by `recipe.batch_size` where they are small enough to keep; a loader that
    augments at random should be used with `Recipe(batch_size=None)`, which takes its batches as they come. Dropout and
    batch statistics work as in any training; they draw from the global random state.
    """
    likelihood, recipe = resolve_likelihood(likelihood), recipe or Recipe()
    batches = Batches.unchecked(train_loader, keep=recipe.batch_size is not None)
    subset = Subset.of(model, matching_names(model, "all"))
    start = subset.flatten({name: p.detach() for name, p in model.named_parameters()})
    delta = delta_of_names(prior_precision, subset, start)

    def gradient(theta: Tensor, batch: Batch) -> Tensor:
        theta = theta.requires_grad_()
        arguments, keywords = ((), batch.x) if isinstance(batch.x, dict) else ((batch.x,), {})
        with torch.enable_grad():
            f = output_tensor(functional_call(model, subset.unflatten(theta), arguments, keywords))
            likelihood.check_targets(f, batch.y)
            prior = 0.5 * (delta * theta.square()).sum()
            loss = likelihood.nll(f.flatten(1), batch.y).sum() + len(batch) / batches.n_data * prior
            (slope,) = torch.autograd.grad(loss, theta)
        return slope

    generator = torch.Generator().manual_seed(seed)
    model.train()
    try:
        trained = fit_weights(start, gradient, batches, recipe=recipe, generator=generator, progress_bar=progress_bar)
    finally:
        model.eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in subset.unflatten(trained).items():
            parameters[name].copy_(value)
    return model
