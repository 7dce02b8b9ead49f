"""The state of a network before training: whether it has been trained already, from its loss on training rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdl_bench.problem.loader_checks import each_item
from bdl_bench.problem.problem import Problem
from bdl_bench.problem.queries import rows
from bdl_bench.records.record import Training
from estimators.likelihoods import Bernoulli, Categorical, Gaussian
from estimators.likelihoods.categorical import Sites
from estimators.models.outputs import output_tensor
from estimators.models.structural_copy import structural_copy
from estimators.numerics.pytrees import PyTree, forward_arguments

__all__ = ["StartingPoint", "starting_point"]

_LABELS = 1000
"""Approximate number of labels that the loss is averaged over: enough to distinguish trained from fresh networks."""
_SHARE = 0.8
"""A network counts as trained if its loss is below this share of the loss without training. That is log C nats for C
classes; in regression the mean squared error is divided by the variance of the targets. Fresh networks are near 1."""


@dataclass(frozen=True)
class StartingPoint:
    """How a problem's network will be trained, and whether its weights have been trained before.

    Args:
        recipe: the recipe, as text.
        epochs: its epochs.
        loss: mean −log p of a label before the training, in nats; None unless the likelihood is Gaussian, categorical
            or Bernoulli.
        trained: whether the weights have been trained before, judged by `loss`.
    """

    recipe: str
    epochs: int
    loss: float | None
    trained: bool

    def training(self, seconds: float) -> Training:
        """Return the training of a record, which took this many seconds."""
        return Training(
            seconds=seconds, recipe=self.recipe, epochs=self.epochs, loss_before=self.loss, further=self.trained
        )


def starting_point(problem: Problem) -> StartingPoint:
    """Return the starting point of a problem whose recipe trains its network; the problem is not changed."""
    assert problem.recipe is not None
    with closing(each_item("train", problem.train)) as items:
        n_rows = sum(len(batch) for batch in rows(items))
    epochs = problem.recipe.resolve(n_rows).epochs
    assert isinstance(epochs, int)
    loss, share = _loss_and_share(problem)
    return StartingPoint(repr(problem.recipe), epochs, loss, trained=share is not None and share < _SHARE)


def _loss_and_share(problem: Problem) -> tuple[float | None, float | None]:
    """Return the mean −log p of a label in nats, and its share of the loss without training; None if unknown."""
    likelihood = problem.likelihood
    if not isinstance(likelihood, (Gaussian, Categorical, Bernoulli)):
        return None, None
    nll = n_labels = untrained = 0.0
    errors, targets = [], []
    for f, y in _outputs(problem):
        nll += float(likelihood.nll(f, y).sum())
        if isinstance(likelihood, Categorical):
            sites = likelihood.given(y)
            n, classes = (int(sites.kept.sum()), sites.by_site(f).shape[-1]) if isinstance(sites, Sites) else (
                len(y), f.shape[-1])  # fmt: skip
            n_labels, untrained = n_labels + n, untrained + n * math.log(classes)
        else:
            n_labels, untrained = n_labels + y.numel(), untrained + y.numel() * math.log(2)
        if isinstance(likelihood, Gaussian):
            errors.append((f - y.flatten(1)).square())
            targets.append(y.flatten(1).double())
    if not n_labels:
        return None, None
    if isinstance(likelihood, Gaussian):
        joined = torch.cat(targets)
        spread = float((joined - joined.mean(0)).square().sum())
        share = float(torch.cat(errors).sum()) / spread if spread > 0 else None
    else:
        share = nll / untrained if untrained > 0 else None
    return nll / n_labels, share


def _outputs(problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield outputs (B, C) in float64 and targets of batches until there are enough labels."""
    network = structural_copy(problem.model).eval()
    n_labels = 0
    with closing(each_item("train", problem.train)) as items:
        for batch in rows(items):
            with torch.no_grad():
                yield _forward(network, batch.x).flatten(1).double(), batch.y
            n_labels += batch.y.numel()
            if n_labels >= _LABELS:
                return


def _forward(network: nn.Module, x: PyTree) -> Tensor:
    arguments, keywords = forward_arguments(x)
    return output_tensor(network(*arguments, **keywords))
