"""Stochastic gradient descent, for MAP networks and for the minibatch refits of RegVar."""

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
from estimators.models.subsets import Subset, delta_of_names, matching_names, mean_of_names
from estimators.numerics.pytrees import PyTree, copied, forward_arguments
from estimators.option_checks import PriorOption, checked_number, checked_precision, checked_prior_mean, checked_seed
from estimators.runtime.module_wrappers import parameter_names, unwrapped
from estimators.runtime.progress import track
from estimators.training.loop import BatchGradient, EpochCallback, TrainerState
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
    progress_bar: bool = False,
) -> Tensor:
    """Minimise a sum over rows by stochastic gradient descent.

    Gradients are divided by the rows of a full batch, so that a row has equal weight in a smaller last batch. All
    entries of `weights` see the same batches, in the order drawn from `generator`.

    Args:
        weights: initial weights, any shape; several copies may be stacked.
        gradient: function of the weights and a batch: the gradient of the batch's part of the sum L.
        batches: the training data.
        recipe: epochs, batch size, optimizer, learning rates.
        generator: the generator of the order of rows.
        epoch_callback: function of the weights after each epoch: a factor of the learning rate. A factor other than 1
            resets the momentum.
        progress_bar: whether to show progress on the terminal.

    Returns:
        The final weights, or the average of the iterates, in the shape of `weights`.

    Raises:
        ConvergenceError: the weights are not finite.
    """
    recipe = recipe.resolve(batches.n_data)
    assert not isinstance(recipe.epochs, str)
    state = TrainerState(weights, recipe, batches.n_data, generator)
    for _ in track(range(recipe.epochs), "epochs", shown=progress_bar):
        for batch in epoch(batches, recipe, generator):
            state.step(gradient, batch)
        state.end_epoch(epoch_callback)
    return state.result


def epoch(batches: TrainingData, recipe: Recipe, generator: torch.Generator, *, even: bool = False) -> Iterable[Batch]:
    """Return the batches of one epoch; `even` regroups rows into batches whose sizes differ by at most 1."""
    size = recipe.resolve(batches.n_data).batch_size
    assert not isinstance(size, str)
    return batches if size is None else batches.shuffled(size, generator, even=even)


def train_map(
    model: nn.Module,
    likelihood: str | Likelihood,
    train_loader: Iterable[Any],
    *,
    prior_precision: PriorOption,
    prior_mean: PriorOption = 0.0,
    recipe: Recipe | None = None,
    seed: int = 0,
    progress_bar: bool = False,
) -> nn.Module:
    """Train a model in place to the maximum of log p(D|θ) − ½ Σ δ(θ − θ₀)², with sums over rows; it ends in eval mode.

    The rows are read once and regrouped by `recipe.batch_size` if they are small enough to keep. Use
    `Recipe(batch_size=None)` with a loader that augments at random: it takes the loader's batches in order. Dropout and
    batch statistics work as in any training, and draw from the global random state.

    Args:
        model: the network; all parameters that require a gradient are trained.
        likelihood: a likelihood, or the name of one such as "regression".
        train_loader: batches (x, y).
        prior_precision: δ >= 0, or a mapping from globs of parameter names to numbers.
        prior_mean: θ₀: a number, a tensor (P,) of all trained weights, or a mapping such as a state dict.
        recipe: epochs, batch size, optimizer, learning rates; None takes `Recipe()`.
        seed: seed of the order of rows.
        progress_bar: whether to show progress on the terminal.

    Returns:
        The model.

    Raises:
        OptionError: an option is out of its range.
        DataError: a batch does not fit the model or the likelihood.
        ConvergenceError: the weights are not finite.
    """
    likelihood, recipe = resolve_likelihood(likelihood), recipe or Recipe()
    inner, keep = unwrapped(model), recipe.batch_size is not None
    batches = TrainingData.unchecked(train_loader, keep=keep, outputs=partial(_outputs_in_eval_mode, inner))
    subset = Subset.of(inner, matching_names(inner, "all"))
    own_names, parameters = parameter_names(inner), dict(inner.named_parameters())
    start = subset.flatten({name: parameters[own].detach() for name, own in own_names.items()})
    if isinstance(prior_precision, (Mapping, Tensor)):
        prior_precision = checked_precision(prior_precision)
    else:
        prior_precision = checked_number("prior_precision", prior_precision, at_least=0)
    delta = delta_of_names(prior_precision, subset, start)
    mean = mean_of_names(checked_prior_mean(prior_mean), subset, start, inner)

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
        return slope + len(batch) / batches.n_data * delta * (theta.detach() - mean)

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
    """Write θ (P,) into the parameters, in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, subset.unflatten(theta.detach()).values(), strict=True):
            parameter.copy_(value)


def _outputs_in_eval_mode(model: nn.Module, x: PyTree) -> Tensor:
    """Return f (B, ...) without a graph; the training modes of the modules are restored."""
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
