"""BatchEnsemble: members that share each weight matrix up to a rank-one factor of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.func import grad

from estimators.data.batch import Batch
from estimators.errors import ModelError, OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.members import WeightMembersEstimator
from estimators.estimator.options import PriorOptions, inherits_options
from estimators.likelihoods import Likelihood
from estimators.models.derivative_routes import BY_IDENTITY
from estimators.models.kernels import differentiable
from estimators.models.subsets import Subset
from estimators.objective.objective import Objective
from estimators.option_checks import checked_instance, checked_integer, checked_number, checked_seed
from estimators.persistence.state import Learned
from estimators.runtime.module_wrappers import parameter_names, plain_names, unwrapped
from estimators.runtime.rng import seeded_random_state
from estimators.training.recipe import Recipe
from estimators.training.retraining import MakeModel, check_architecture, checked_make_model
from estimators.training.training import fit_weights

__all__ = ["BatchEnsemble", "RankOneMembers"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight (out, in, ...) has one factor per output and per input channel."""


class BatchEnsemble(WeightMembersEstimator):
    """S networks that share their weights up to rank-one factors (Wen, Tran and Ba 2020, arXiv 2002.06715, equation 1).

        W_s = W ∘ (a_s r_sᵀ) in every linear layer and convolution, with a bias of its own, s = 1 ... S
        minimise (1/S) Σ_s L(θ_s) over W, all r_s, a_s and biases, and the other weights, which are shared

    All are trained together, from a new network, by `recipe`. L is the loss of every other estimator here, with the
    prior on the weights θ_s of each member; the paper has weight decay on W. With r_s = a_s = 1 this is the training of
    one network.

    The paper divides a minibatch among the members; here each member sees every row, so that an epoch costs S passes.
    As in every estimator here, dropout is off and the statistics of a BatchNorm are those of the given model, frozen.
    The fit stores the shared weights once, and two vectors and a bias per layer and member.

    The implementation multiplies weights, not activations as the paper does: the functions are equal, any use of a
    layer's weight is covered, and members are evaluated one after another.

    Args:
        model: the trained network, in eval mode; it is not changed. It is the architecture, not a member.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        make_model: builds a new network of the architecture of `model` with weights from the global random state, which
            `fit` restores.
        recipe: how to train; use the recipe of the model.
        n_members: the number S >= 2 of members; 4 in the paper.
        init_std: the initial r and a are N(1, init_std²). None: random signs, as in the paper's experiments on CIFAR.
        seed: the seed of initial weights, factors and the order of rows.

    Attributes:
        members_: the shared weights and the factors.
        fit_report_: the passes of the fit, including the training.

    Raises:
        OptionError: for an invalid option. `fit` raises ModelError for a `make_model` of another architecture, and for
            a network without trainable linear or convolution layers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators.training import Recipe
        >>> def network():
        ...     return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> options = {"make_model": network, "recipe": Recipe(epochs=2), "n_members": 3}
        >>> ensemble = BatchEnsemble(network().eval(), "regression", **options)
        >>> ensemble.fit([(torch.randn(8, 3), torch.randn(8, 2))]).member_outputs(torch.randn(4, 3)).shape
        torch.Size([3, 4, 2])
    """

    retrains = True

    @inherits_options(UncertaintyEstimator, PriorOptions)
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        make_model: MakeModel,
        recipe: Recipe,
        n_members: int = 4,
        init_std: float | None = None,
        seed: int = 0,
        **prior: Unpack[PriorOptions],
    ) -> None:
        super().__init__(model, likelihood, **prior)
        self.make_model: MakeModel = _given(checked_make_model(make_model))
        self.recipe = checked_instance("recipe", recipe, Recipe, remedy="Recipe(epochs=100).")
        self.n_members, self.seed = checked_integer("n_members", n_members, at_least=2), checked_seed(seed)
        self.init_std = None if init_std is None else checked_number("init_std", init_std, at_least=0, remedy="0.5.")

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        objective.network.routes.swap = BY_IDENTITY  # replaces every use of a weight, for all inputs
        objective.check_displaced()
        layout = _Layout.of(objective.network.module, objective.network.subset, self.n_members)
        start = self._start(objective, layout)

        def gradient(weights: Tensor, batch: Batch) -> Tensor:
            """Return the gradient of the batch's part of (1/S) Σ_s L(θ_s), one member at a time."""
            targets, share = objective.data_term.targets(objective.network, batch), objective.share(batch)

            def loss(weights: Tensor, s: int) -> Tensor:
                return objective.batch_loss(layout.member(weights, s), batch.x, targets, share)

            total = torch.zeros_like(weights)
            for s in range(self.n_members):
                with differentiable(), objective.network.pass_counter.transformed(backward=1):
                    total += grad(loss)(weights, s).detach()
            return total / self.n_members

        with objective.network.pass_counter.phase("training"):
            weights = fit_weights(
                start,
                gradient,
                objective.batches,
                recipe=self.recipe,
                generator=torch.Generator().manual_seed(self.seed),
                progress_bar=progress_bar,
            )
        self.members_ = RankOneMembers(layout, weights)

    def _start(self, objective: Objective, layout: _Layout) -> Tensor:
        """Return the weights of a new network with initial factors, flat."""
        with seeded_random_state(self.seed):
            made = unwrapped(self.make_model()).to(objective.theta)
        check_architecture(made, objective.network.module)
        named, own = dict(made.named_parameters()), parameter_names(made)
        theta = objective.network.subset.flatten({name: named[inner].detach() for name, inner in own.items()})
        generator = torch.Generator().manual_seed(self.seed)
        factors = torch.randn(layout.n_factors, generator=generator, dtype=torch.float64)
        factors = factors.sign() if self.init_std is None else 1 + self.init_std * factors
        return layout.start(theta, factors.to(theta))

    def _get_fit_state(self) -> Learned:
        return {"weights": self.members_.weights}, {}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        objective.network.routes.swap = BY_IDENTITY
        layout = _Layout.of(objective.network.module, objective.network.subset, self.n_members)
        self.members_ = RankOneMembers(layout, tensors["weights"])

    def _member_weights(self) -> Iterator[Tensor]:
        return (self.members_.theta(s) for s in range(self.n_members))


@dataclass(frozen=True)
class RankOneMembers:
    """The shared weights of a BatchEnsemble with the factors and biases of its members.

    Attributes:
        layout: where each is in the flat tensor.
        weights: all of them, flat.
    """

    layout: _Layout
    weights: Tensor

    def theta(self, s: int) -> Tensor:
        """Return θ_s, (P,), the weights of one member as a network of its own.

        Args:
            s: the index of the member.

        Returns:
            The weights.
        """
        return self.layout.member(self.weights, s)

    def factors(self, s: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the vectors (a_s, r_s), of the output and input channels, by the name of the shared weight.

        Args:
            s: the index of the member.

        Returns:
            Pairs of vectors.
        """
        own = self.layout.own(self.weights, s)
        return {name: (own[f"{name}/a"], own[f"{name}/r"]) for name in self.layout.groups}


@dataclass(frozen=True)
class _Layout:
    """Where shared weights θ (P,) and what each member owns are in one flat tensor, θ first.

    A member owns a (out,) and r (in,) for each converted weight, and the biases of these layers, whose entries of θ are
    not used.

    Args:
        subset: the parameters.
        groups: the number of groups of each converted layer, by the name of its weight.
        sizes: the shape of each tensor that a member owns, by name: those of factors end in /a and /r.
        n_members: S.
    """

    subset: Subset
    groups: Mapping[str, int]
    sizes: Mapping[str, torch.Size]
    n_members: int

    @classmethod
    def of(cls, model: nn.Module, subset: Subset, n_members: int) -> _Layout:
        """Return the layout of a network. Raises ModelError without trainable linear or convolution layers."""
        names = {id(p): name for name, p in _plain_parameters(model).items() if name in subset.shapes}
        groups: dict[str, int] = {}
        sizes: dict[str, torch.Size] = {}
        for layer in model.modules():
            if not isinstance(layer, _LAYERS) or id(layer.weight) not in names:
                continue
            name, count = names[id(layer.weight)], getattr(layer, "groups", 1)
            groups[name] = count
            sizes[f"{name}/a"] = torch.Size([layer.weight.shape[0]])
            sizes[f"{name}/r"] = torch.Size([layer.weight.shape[1] * count])
            if layer.bias is not None and id(layer.bias) in names:
                sizes[names[id(layer.bias)]] = layer.bias.shape
        if not groups:
            raise ModelError(
                "a network with trainable linear or convolution layers, whose weights the members share",
                received=f"a {type(model).__name__} without",
                remedy="DeepEnsemble for other networks.",
            )
        return cls(subset, groups, sizes, n_members)

    @property
    def n_factors(self) -> int:
        """The number of entries of all vectors a and r of all members."""
        return self.n_members * sum(size.numel() for name, size in self.sizes.items() if _is_factor(name))

    def start(self, theta: Tensor, factors: Tensor) -> Tensor:
        """Return the flat tensor of weights θ (P,) and factors, with the biases of θ for every member."""
        values, parts = self.subset.unflatten(theta), [theta]
        lengths = [size.numel() for name, size in self.sizes.items() if _is_factor(name)]
        drawn = iter(factors.split(lengths * self.n_members))
        for _ in range(self.n_members):
            parts += [next(drawn) if _is_factor(name) else values[name].flatten() for name in self.sizes]
        return torch.cat(parts)

    def own(self, weights: Tensor, s: int) -> dict[str, Tensor]:
        """Return what member s owns, by name."""
        lengths = [size.numel() for size in self.sizes.values()]
        first = self.subset.n_parameters + s * sum(lengths)
        parts = weights[first : first + sum(lengths)].split(lengths)
        return {name: part.view(size) for part, (name, size) in zip(parts, self.sizes.items(), strict=True)}

    def member(self, weights: Tensor, s: int) -> Tensor:
        """Return θ_s (P,); differentiable in the weights."""
        shared, own = self.subset.unflatten(weights[: self.subset.n_parameters]), self.own(weights, s)
        values = {}
        for name, value in shared.items():
            if name in self.groups:
                factor = _outer(own[f"{name}/a"], own[f"{name}/r"], self.groups[name])
                values[name] = value * factor.view(*factor.shape, *[1] * (value.ndim - 2))
            else:
                values[name] = own.get(name, value)
        return self.subset.flatten(values)


def _given(make_model: MakeModel | None) -> MakeModel:
    if make_model is None:
        raise OptionError(
            "make_model, a function without arguments that builds a network",
            received="None",
            remedy="make_model=lambda: MyNetwork(...).",
        )
    return make_model


def _outer(a: Tensor, r: Tensor, groups: int) -> Tensor:
    """Return a rᵀ, (out, in / groups): the outputs of a group see its own inputs."""
    rows = r.view(groups, 1, -1).expand(-1, len(a) // groups, -1).reshape(len(a), -1)
    return a[:, None] * rows


def _is_factor(name: str) -> bool:
    return name.endswith(("/a", "/r"))


def _plain_parameters(model: nn.Module) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return {plain: parameters[name] for name, plain in plain_names(model, parameters)}
