"""Deep ensemble: networks trained from different initialisations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from estimators.errors import ModelError, OptionError
from estimators.estimator.members import MembersEstimator
from estimators.likelihoods import Likelihood
from estimators.likelihoods.prediction import Prediction
from estimators.models.checks import check_model
from estimators.models.function_checks import check_parameter_swap
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import PriorOption, checked_instance, checked_integer, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.module_wrappers import unwrapped
from estimators.runtime.progress import track
from estimators.runtime.rng import member_seeds
from estimators.training.recipe import Recipe
from estimators.training.retraining import (
    MakeModel,
    Retraining,
    check_architecture,
    checked_make_model,
    tensors_by_name,
)

__all__ = ["DeepEnsemble"]

_N_MEMBERS = 5
"""The default size of an ensemble, as in Lakshminarayanan et al. (2017)."""


class DeepEnsemble(MembersEstimator):
    """Networks trained from independent initialisations and orders of the rows (Lakshminarayanan et al. 2017).

        f_1 = the given model, f_2 ... f_S = make_model() trained by `recipe` on the same loss and prior

    With `members` all networks are given, and `fit` trains nothing. It checks that they have the architecture of the
    model and differ from each other, and that a copy of the model with their weights gives their outputs on the data.

    The variance is that between local optima over all weights; it does not approximate a Laplace variance. Each member
    has its own buffers, such as the statistics of a BatchNorm. Unlike in the paper, there are no adversarial examples.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        make_model: builds a new network of the architecture of `model` with weights from the global random state, which
            `fit` restores.
        recipe: how to train a member; use the recipe of the model.
        members: the trained networks f_2 ... f_S, in eval mode, instead of `make_model` and `recipe`. `model`, always
            the first member, may be among them.
        n_members: the number S >= 2 of members, including the model. The members of a larger ensemble start with those
            of a smaller one. None: 5, or the number of given networks.
        seed: the seed of initialisations and orders.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> def network(seed):
        ...     torch.manual_seed(seed)
        ...     return nn.Linear(3, 2).eval()  # trained, in real use
        >>> ensemble = DeepEnsemble(network(0), "regression", members=[network(1), network(2)])
        >>> ensemble.fit([(torch.randn(8, 3), torch.randn(8, 2))]).variance(torch.randn(4, 3)).shape
        torch.Size([4, 2])

    Attributes:
        members_: the tensors of f_2 ... f_S by name.
        fit_report_: the passes of the fit, including the training of the members.

    Raises:
        OptionError: for both or neither of `make_model` and `members`. `fit` raises ModelError for a member of
            another architecture.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        make_model: MakeModel | None = None,
        recipe: Recipe | None = None,
        members: Sequence[nn.Module] | None = None,
        n_members: int | None = None,
        seed: int = 0,
        prior_precision: PriorOption = 1.0,
    ) -> None:
        super().__init__(model, likelihood, prior_precision=prior_precision)
        _check_sources(make_model, recipe, members)
        self.n_members = _number_of_members(n_members, self._others(members))
        self.make_model = checked_make_model(make_model)
        remedy = "Recipe(epochs=100)."
        self.recipe = None if recipe is None else checked_instance("recipe", recipe, Recipe, remedy=remedy)
        self.seed, self.members = checked_seed(seed), members

    def _others(self, members: Sequence[nn.Module] | None) -> list[nn.Module] | None:
        """Return the given networks without the model itself, which may be listed once."""
        if members is None:
            return None
        is_model = [isinstance(member, nn.Module) and unwrapped(member) is self.model for member in members]
        first = is_model.index(True) if any(is_model) else None
        return [member for i, member in enumerate(members) if i != first]

    export_route = "batch"

    def _export_moments(self, x: PyTree) -> tuple[Tensor, Tensor]:
        members = self._members(x)
        shape = self.network_.shaped_outputs(x).shape
        return members.reshape(-1, *shape), members.var(0).reshape(shape)

    def _export_prediction(self, mean: Tensor, variance: Tensor) -> Prediction:
        averaged = None if self.likelihood.kind == "regression" else mean  # of all members
        return self.likelihood.predict(mean.mean(0), variance, averaged)

    @property
    def retrains(self) -> bool:  # type: ignore[override]
        """Whether a fit trains networks."""
        return self.members is None

    @classmethod
    def _option_names(cls) -> list[str]:
        return [name for name in super()._option_names() if name != "members"]  # compared by their tensors

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        if self.members is not None:
            others = self._others(self.members)
            assert others is not None
            self.members_ = _tensors_of(others, objective)
            self._check_exchanged(objective, others)
            return
        assert self.make_model is not None
        assert self.recipe is not None
        retraining = Retraining(self.make_model, self.recipe, self.prior_precision)
        trained: list[nn.Module] = []
        for seed in track(member_seeds(self.seed, self.n_members - 1), "members", shown=progress_bar):
            trained.append(retraining.run(objective, seed, others=trained, progress_bar=False))
        self.members_ = [self._member_tensors(model) for model in trained]
        self._check_exchanged(objective, trained)

    def _check_exchanged(self, objective: Objective, trained: Sequence[nn.Module]) -> None:
        """Check that the model with the tensors of a member computes what the member does. Raises ModelError."""
        for batch in objective.batches:
            for model, member in zip(trained, self.members_, strict=True):
                check_parameter_swap(objective.network, batch.x, member, model)

    def _member_tensors(self, trained: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a member that differ from those of the model."""
        return tensors_by_name(trained)

    def _get_fit_state(self) -> Learned:
        tensors = {f"{i}/{name}": t for i, member in enumerate(self.members_) for name, t in member.items()}
        return tensors, {"swap": self.network_.routes.swap}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        objective.network.routes.swap = learned["swap"]
        self.members_ = [{} for _ in range(self.n_members - 1)]
        for key, tensor in tensors.items():
            i, _, name = key.partition("/")
            self.members_[int(i)][name] = tensor

    def _members(self, x: PyTree) -> Tensor:
        network = self.network_
        with torch.no_grad():
            others = [network.functional_outputs(member, x) for member in self.members_]
        return torch.stack([network.outputs(x), *others])


def _number_of_members(n_members: int | None, members: Sequence[nn.Module] | None) -> int:
    given = None if members is None else 1 + len(members)
    n = (given or _N_MEMBERS) if n_members is None else n_members
    n = checked_integer("n_members", n, at_least=2)
    if given is not None and n != given:
        raise OptionError(
            f"n_members={given}, the model and its {given - 1} members", received=str(n), remedy="leave n_members out."
        )
    return n


def _check_sources(make_model: MakeModel | None, recipe: Recipe | None, members: Sequence[nn.Module] | None) -> None:
    if members is not None and not isinstance(members, (Sequence, nn.ModuleList)):
        raise OptionError(
            "members as a list of networks",
            received=f"a {type(members).__name__}",
            remedy="members=[network_2, network_3].",
        )
    complete = make_model is not None and recipe is not None
    none = make_model is None and recipe is None
    if (members is None and not complete) or (members is not None and not none):
        raise OptionError(
            "members, or make_model and recipe to train them",
            received=f"members={'None' if members is None else f'a list of {len(members)}'}, "
            f"make_model={make_model}, recipe={recipe}",
            remedy="members=[...], or make_model=lambda: MyNetwork(...) and recipe=Recipe(...).",
        )


def _tensors_of(members: Sequence[nn.Module], objective: Objective) -> list[dict[str, Tensor]]:
    """Return copies of the members' tensors by name, with the device and dtype of the model. Raises ModelError."""
    networks = [tensors_by_name(objective.network.module)]
    for index, member in enumerate(members):
        if not isinstance(member, nn.Module):
            raise ModelError(
                "members that are torch.nn.Modules",
                received=f"a {type(member).__name__} at index {index}",
                remedy="load the networks first.",
            )
        check_model(member)
        check_architecture(member, objective.network.module, what=f"members[{index}] with")
        found, theta = tensors_by_name(member), objective.theta
        kinds = {name: theta if t.is_floating_point() else theta.device for name, t in found.items()}
        tensors = {name: t.to(kinds[name], copy=True) for name, t in found.items()}
        _check_distinct(index, tensors, networks)
        networks.append(tensors)
    return networks[1:]


def _check_distinct(index: int, tensors: dict[str, Tensor], others: Sequence[dict[str, Tensor]]) -> None:
    """Raise ModelError if a network is passed twice, which would only reduce the variance."""
    for number, other in enumerate(others):
        if all(torch.equal(tensor, other[name]) for name, tensor in tensors.items()):
            duplicate = "the model" if number == 0 else f"members[{number - 1}]"
            raise ModelError(
                "members that differ from the model and from each other",
                received=f"the weights of {duplicate} again in members[{index}]",
                remedy="pass networks of other seeds, each once; of the model pass the object itself, or leave it out.",
            )
