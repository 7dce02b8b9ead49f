"""Train a network of one's own from a fresh initialisation, on the rows of a fit, and count what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from estimators.data.training_data import TrainingData
from estimators.errors import ModelError, OptionError
from estimators.objective.objective import Objective
from estimators.runtime.module_wrappers import plain_names, unwrapped
from estimators.runtime.rng import seeded_random_state
from estimators.training.recipe import Recipe
from estimators.training.training import train_map

__all__ = ["MakeModel", "Retraining", "checked_make_model", "tensors_by_name"]

MakeModel = Callable[[], nn.Module]


@dataclass(frozen=True)
class Retraining:
    """`make_model()`, trained by `recipe` to the maximum of L with this prior precision.

    The passes are entered in the ledger of the objective under "training".
    Errors: ModelError where `make_model` gives another architecture than the model's, or a network that is in use.
    """

    make_model: MakeModel
    recipe: Recipe
    prior_precision: float | Mapping[str, float]

    def run(self, objective: Objective, seed: int, *, others: Sequence[nn.Module], progress_bar: bool) -> nn.Module:
        """The trained network, in eval mode; initialisation, order of rows and dropout are drawn from `seed`.

        `others`: networks that it must not share a weight with.
        """
        with seeded_random_state(seed):
            model = self._fresh(objective, others)
            rows = _Rows(objective.batches)
            options: dict[str, Any] = {"recipe": self.recipe, "seed": seed, "progress_bar": progress_bar}
            train_map(model, objective.likelihood, rows, prior_precision=self.prior_precision, **options)
        self._count(objective)
        return model

    def _fresh(self, objective: Objective, others: Sequence[nn.Module]) -> nn.Module:
        """A new network on the device and of the dtype of the objective; frozen weights may be shared."""
        model = unwrapped(self.make_model()).to(objective.theta)
        refuse_other_architecture(model, objective.network.module)
        taken = {id(p) for other in [objective.network.module, *others] for p in other.parameters()}
        if any(id(p) in taken for p in model.parameters() if p.requires_grad):
            raise ModelError(
                "a make_model that builds a new network at each call",
                received="one that returns weights in use, which training would overwrite",
                remedy="build the modules inside the function: make_model=lambda: MyNetwork(...).",
            )
        return model

    def _count(self, objective: Objective) -> None:
        n = objective.batches.n_data
        epochs = self.recipe.resolve(n).epochs
        assert not isinstance(epochs, str)
        with objective.network.pass_counter.phase("training"):
            objective.network.pass_counter.forward(epochs * n)
            objective.network.pass_counter.backward(epochs * n)


@dataclass(frozen=True)
class _Rows:
    """Batches as a loader of pairs; those that are not stored as their own loader, which shuffles anew each epoch."""

    batches: TrainingData

    def __iter__(self) -> Iterator[Any]:
        if self.batches.stored is None:
            return iter(self.batches.loader)
        return ((batch.x, batch.y) for batch in self.batches.stored)


def checked_make_model(make_model: object) -> MakeModel:
    """Return a function without arguments. Raises OptionError for what cannot be called, as a network can."""
    if callable(make_model) and not isinstance(make_model, nn.Module):
        return make_model
    raise OptionError(
        "make_model, a function without arguments that builds a network",
        received=f"an object of class {type(make_model).__name__}",
        remedy="make_model=lambda: MyNetwork(...).",
    )


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, all that tells one trained network from another."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return {plain: tensors[name].detach() for name, plain in plain_names(model, tensors)}


def refuse_other_architecture(model: nn.Module, expected: nn.Module, *, what: str = "a make_model that builds") -> None:
    """ModelError where the names or shapes of parameters and buffers differ."""
    here, there = tensors_by_name(expected), tensors_by_name(model)
    differing = [n for n in sorted(here.keys() | there.keys()) if _shape(here.get(n)) != _shape(there.get(n))]
    if differing:
        name = differing[0]
        raise ModelError(
            f"{what} the architecture of the model, with {name!r} {_shape(here.get(name))}",
            received=f"one with {name!r} {_shape(there.get(name))}; {len(differing)} tensors differ",
            remedy="build the network that was trained, wrapped in the same way.",
        )


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"of shape {tuple(tensor.shape)}"
