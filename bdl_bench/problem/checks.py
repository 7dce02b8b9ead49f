"""Checks of a problem's options and networks when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from estimators.baselines.dropout_layers import dropout_names
from estimators.baselines.retraining import check_architecture
from estimators.errors import DataError, ModelError, OptionError
from estimators.models.checks import check_model
from estimators.numerics.pytrees import PyTree

__all__ = [
    "check_dropout_model",
    "check_members",
    "check_plot_grid",
    "check_precision",
    "check_trained",
    "check_trained_option",
]


def check_precision(value: float | Mapping[str, float]) -> None:
    """Check that δ is finite, not negative, and positive for some parameters. Raises OptionError."""
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    plain = all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in numbers)
    if not numbers or not plain or not any(v > 0 for v in numbers):
        raise OptionError(
            "prior_precision > 0, a number or a mapping {glob of parameter names: number >= 0}",
            received=repr(value),
            remedy="δ of the sum convention; from weight decay wd on a mean cross-entropy over N rows it is N·wd.",
        )


def check_trained(model: nn.Module) -> None:
    """Check that a network without a recipe is in eval mode and finite. Raises ModelError."""
    if model.training:
        raise ModelError(
            "a trained network in eval mode, since no recipe trains it",
            received="a network in train mode",
            remedy="call model.eval(), or pass recipe=Recipe(...) (without trained=True) to have it trained.",
        )
    check_model(model)


def check_trained_option(trained: bool | None, *, has_recipe: bool) -> None:
    """Check that a network that is not trained has a recipe. Raises OptionError."""
    if trained is False and not has_recipe:
        raise OptionError(
            "a recipe for a network that is not trained",
            received="trained=False without one",
            remedy="recipe=Recipe(...), or omit trained.",
        )


def check_members(members: Sequence[nn.Module], model: nn.Module) -> None:
    """Check that members are trained networks with the architecture of the model. Raises ModelError."""
    for index, member in enumerate(members):
        if not isinstance(member, nn.Module):
            raise ModelError(
                "members that are torch.nn.Modules",
                received=f"a {type(member).__name__} as members[{index}]",
                remedy="load the networks first, or pass a function that does.",
            )
        check_trained(member)
        check_architecture(member, model, what=f"members[{index}] with")


def check_dropout_model(model: nn.Module) -> None:
    """Check that a network is trained and has dropout layers. Raises ModelError."""
    if not isinstance(model, nn.Module) or not dropout_names(model):
        raise ModelError(
            "a dropout_model with layers nn.Dropout of p > 0",
            received=f"a {type(model).__name__} without",
            remedy="omit dropout_model; with make_model and recipe a network with dropout is trained.",
        )
    check_trained(model)


def check_plot_grid(batches: list[PyTree]) -> None:
    """Check that the inputs of a plot grid have one column and ascend over all batches. Raises DataError."""
    one_column = all(isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == 1 for x in batches)
    if not one_column or bool((torch.cat(batches).diff(dim=0) < 0).any()):
        x = batches[0]
        raise DataError(
            "a plot_grid of ascending inputs, x (M, 1)",
            received=f"x of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}",
            remedy="torch.linspace(...).unsqueeze(1), or no plot_grid if inputs have several columns.",
        )
