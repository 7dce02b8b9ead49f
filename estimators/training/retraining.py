"""Train a new network on the rows of a fit, and count the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from estimators.data.batch import PairLoader
from estimators.errors import ModelError, OptionError
from estimators.objective.objective import Objective
from estimators.option_checks import PriorOption
from estimators.runtime.module_wrappers import plain_names, unwrapped
from estimators.runtime.rng import seeded_random_state
from estimators.training.recipe import Recipe
from estimators.training.training import train_map

__all__ = ["MakeModel", "Retraining", "checked_make_model", "tensors_by_name"]

MakeModel = Callable[[], nn.Module]


def _unchanged(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Retraining:
    """Trains `adapt(make_model())` by `recipe` to the minimum of L with this prior.

    The objective's pass counter counts the passes under "training". Raises ModelError if `make_model` builds another
    architecture than the model's, or returns a network that is in use.
    """

    make_model: MakeModel
    recipe: Recipe
    prior_precision: PriorOption
    adapt: Callable[[nn.Module], nn.Module] = _unchanged
    prior_mean: PriorOption = 0.0

    def run(self, objective: Objective, seed: int, *, others: Sequence[nn.Module], progress_bar: bool) -> nn.Module:
        """Return the trained network in eval mode. Initialisation, order of rows and dropout are drawn from `seed`.

        It must not share a trainable weight with `others`.
        """
        with seeded_random_state(seed):
            model = self.adapt(self._build_model(objective, others))
            batches = objective.batches  # data that are not stored come from the user's loader, which may shuffle
            rows = batches.loader if batches.stored is None else PairLoader(batches.stored)
            options: dict[str, Any] = {"recipe": self.recipe, "seed": seed, "progress_bar": progress_bar}
            options |= {"prior_precision": self.prior_precision, "prior_mean": self.prior_mean}
            train_map(model, objective.likelihood, rows, **options)
        self._count_passes(objective)
        return model

    def _build_model(self, objective: Objective, others: Sequence[nn.Module]) -> nn.Module:
        """Return a new network with the device and dtype of the objective; frozen weights may be shared."""
        model = unwrapped(self.make_model()).to(objective.theta)
        check_architecture(model, objective.network.module)
        in_use = {id(p) for other in [objective.network.module, *others] for p in other.parameters()}
        if any(id(p) in in_use for p in model.parameters() if p.requires_grad):
            raise ModelError(
                "a make_model that builds a new network in each call",
                received="one that returns weights in use, which training would overwrite",
                remedy="build the modules inside the function: make_model=lambda: MyNetwork(...).",
            )
        return model

    def _count_passes(self, objective: Objective) -> None:
        n = objective.batches.n_data
        epochs = self.recipe.resolve(n).epochs
        assert not isinstance(epochs, str)
        with objective.network.pass_counter.phase("training"):
            objective.network.pass_counter.forward(epochs * n)
            objective.network.pass_counter.backward(epochs * n)


def checked_make_model(make_model: MakeModel | None) -> MakeModel | None:
    """Return a function without arguments, or None. Raises OptionError for a network, or for another object."""
    if make_model is None or (callable(make_model) and not isinstance(make_model, nn.Module)):
        return make_model
    raise OptionError(
        "make_model, a function without arguments that builds a network",
        received=f"an object of class {type(make_model).__name__}",
        remedy="make_model=lambda: MyNetwork(...).",
    )


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return {plain: tensors[name].detach() for name, plain in plain_names(model, tensors)}


def check_architecture(model: nn.Module, expected: nn.Module, *, what: str = "a make_model that builds") -> None:
    """Raise ModelError if the names or shapes of parameters and buffers differ."""
    wanted, found = tensors_by_name(expected), tensors_by_name(model)
    differing = [n for n in sorted(wanted.keys() | found.keys()) if _shape(wanted.get(n)) != _shape(found.get(n))]
    if differing:
        name = differing[0]
        raise ModelError(
            f"{what} the architecture of the model, with {name!r} {_shape(wanted.get(name))}",
            received=f"one with {name!r} {_shape(found.get(name))}; {len(differing)} tensors differ",
            remedy="build the same network as the model, wrapped in the same way.",
        )


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"of shape {tuple(tensor.shape)}"
