"""The one loop of stochastic gradient descent: for MAP networks, and for the minibatch refits of RegVar."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from estimators.data.batch import Batch, split_batch
from estimators.data.checks import check_batch, naming_batch
from estimators.data.training_data import TrainingData
from estimators.errors import DataError
from estimators.likelihoods import Likelihood, resolve_likelihood
from estimators.models.network import Network
from estimators.models.outputs import output_tensor
from estimators.models.subsets import Subset, delta_of_names, matching_names
from estimators.numerics.pytrees import PyTree, copied, forward_arguments
from estimators.option_checks import checked_number, checked_precision, checked_seed
from estimators.persistence.checkpoint import Checkpoint
from estimators.runtime.module_wrappers import parameter_names, unwrapped
from estimators.runtime.progress import track
from estimators.training.loop import BatchGradient, EpochCallback, StopCriterion, TrainerState
from estimators.training.recipe import Recipe

__all__ = ["Recipe", "fit_weights", "train_map"]


def fit_weights(
    weights: Tensor,
    gradient: BatchGradient,
    batches: TrainingData,
    *,
    recipe: Recipe,
    generator: torch.Generator,
    epoch_callback: EpochCallback | None = None,
    stop_criterion: StopCriterion | None = None,
    checkpoint: Checkpoint | None = None,
    progress_bar: bool = False,
) -> Tensor:
    """Descend from `weights` (any shape) along `gradient(weights, batch)`, the slope of the batch's part of the sum L.

    Slopes are divided by the rows of a full batch, so that a row weighs the same in a ragged last batch. Every entry
    sees the same batches, in the order drawn from `generator`: replicas stacked in `weights` differ in nothing else.
    Where `epoch_callback` lowers the rate, the momentum starts anew; where the result is `stop_criterion`, it ends before its last
    epoch. With a `checkpoint` it goes on from the last epoch kept.
    Errors: ConvergenceError where the weights stop being finite.
    """
    recipe = recipe.resolve(batches.n_data)
    assert not isinstance(recipe.epochs, str)
    loop = TrainerState(weights, recipe, batches.n_data, generator)
    checkpoint = checkpoint or Checkpoint()
    if (saved := checkpoint.load()) is not None:
        loop.restore(*saved)
    for _ in track(range(loop.epochs, recipe.epochs), "epochs", shown=progress_bar):
        if stop_criterion is not None and stop_criterion(loop.result, loop.epochs):
            break
        for batch in epoch(batches, recipe, generator):
            loop.step(gradient, batch)
        loop.end_epoch(epoch_callback)
        checkpoint.save(loop.state)
    return loop.result


def epoch(batches: TrainingData, recipe: Recipe, generator: torch.Generator) -> Iterable[Batch]:
    """The batches of one epoch."""
    size = recipe.resolve(batches.n_data).batch_size
    assert not isinstance(size, str)
    return batches if size is None else batches.shuffled(size, generator)


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
    inner, keep = unwrapped(model), recipe.batch_size is not None
    batches = TrainingData.unchecked(train_loader, keep=keep, outputs=partial(_outputs_in_eval_mode, inner))
    subset = Subset.of(inner, matching_names(inner, "all"))
    own_names, parameters = parameter_names(inner), dict(inner.named_parameters())
    start = subset.flatten({name: parameters[own].detach() for name, own in own_names.items()})
    if isinstance(prior_precision, Mapping):
        prior_precision = checked_precision(prior_precision)
    else:
        prior_precision = checked_number("prior_precision", prior_precision, at_least=0)
    delta = delta_of_names(prior_precision, subset, start)

    chosen = [parameters[own_names[name]] for name in subset.shapes]

    def gradient(theta: Tensor, batch: Batch) -> Tensor:
        _write(chosen, subset, theta)  # into the module itself: however forward reaches a weight, it is this one
        arguments, keywords = forward_arguments(batch.x)
        with torch.enable_grad():
            f = output_tensor(inner(*arguments, **keywords))
            likelihood.check_targets(f, batch.y)
            loss = likelihood.nll(f.flatten(1), batch.y).sum()
            slopes = torch.autograd.grad(loss, chosen, allow_unused=True)
        pairs = zip(slopes, chosen, strict=True)
        slope = torch.cat([torch.zeros_like(p).flatten() if g is None else g.to_dense().flatten() for g, p in pairs])
        return slope + len(batch) / batches.n_data * delta * theta.detach()

    generator = torch.Generator().manual_seed(checked_seed(seed))
    model.train()
    trained = start
    try:
        trained = fit_weights(start, gradient, batches, recipe=recipe, generator=generator, progress_bar=progress_bar)
    except (DataError, RuntimeError, IndexError, TypeError):
        model.eval()
        _write(chosen, subset, start)
        _check_every_batch(model, likelihood, train_loader)  # rows were regrouped: says which batch it is
        raise
    finally:
        model.eval()
        _write(chosen, subset, trained)  # after an exception: as they were
    return model


def _write(parameters: list[nn.Parameter], subset: Subset, theta: Tensor) -> None:
    """θ (P,) into the parameters, in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, subset.unflatten(theta.detach()).values(), strict=True):
            parameter.copy_(value)


def _outputs_in_eval_mode(model: nn.Module, x: PyTree) -> Tensor:
    """f (B, ...) without a graph; the model's modes are put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            arguments, keywords = forward_arguments(copied(x))
            return output_tensor(model(*arguments, **keywords))
    finally:
        for module, training in modes:
            module.training = training


def _check_every_batch(model: nn.Module, likelihood: Likelihood, loader: Iterable[Any]) -> None:
    """Raise DataError, with the index of the batch and row, for the first batch that the model cannot be trained on."""
    network = Network(model, matching_names(model, "all"))
    for index, item in enumerate(loader):
        with naming_batch(index):
            check_batch(split_batch(item), network, likelihood)
