"""Mixture of posteriors: the law of total variance over fitted estimators, each at its own network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from estimators.data.batch import PairLoader
from estimators.errors import ModelChangedError, OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.cloning import clone
from estimators.estimator.fit_report import FitReport
from estimators.estimator.members import MembersEstimator
from estimators.estimator.options import constructor_options
from estimators.likelihoods.mixture_prediction import mixture_of_gaussians
from estimators.likelihoods.prediction import Prediction
from estimators.models.exclusive import exclusively
from estimators.models.functionals import ComposedNetwork, Functional, variance_by_covariance
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import (
    as_number,
    checked_choice,
    checked_instance,
    checked_integer,
    checked_seed,
    shown,
)
from estimators.persistence.option_values import described
from estimators.persistence.state import ABOUT, Learned
from estimators.runtime.module_wrappers import plain_names, unwrapped
from estimators.runtime.progress import track
from estimators.runtime.rng import member_seeds, preserved_random_state
from estimators.training.recipe import Recipe
from estimators.training.retraining import MakeModel, Retraining, checked_make_model, tensors_by_name

__all__ = ["Mixture", "RetrainedMixture"]

_SAMPLES = 100
"""Function samples of all components together, if a component has no probit link."""
_N_MEMBERS = 5
"""The default number of networks, as in a deep ensemble."""


class Mixture(UncertaintyEstimator):
    """Mixture of posteriors, such as a mixture of Laplace approximations (Eschenhagen et al. 2021).

        p(f) = Σ_k w_k p_k(f)
        mean = Σ_k w_k μ_k        covariance = Σ_k w_k Σ_k + Σ_k w_k (μ_k − mean)(μ_k − mean)ᵀ

    In classification the probabilities of the components are averaged. Each component has its own network; with SWAG
    at networks of different seeds this is MultiSWAG (Wilson and Izmailov 2020). Components that are `MAP` give the
    variance over networks, with the divisor K where `DeepEnsemble` has K − 1.

    Args:
        estimators: the components, not necessarily fitted, with one likelihood and outputs of one shape. They do not
            change: `fit` fits a copy of each.
        weights: w_k >= 0, one per component; they are divided by their sum. None: equal weights.

    Attributes:
        members_: the fitted components.
        weights_: w_k, which sum to 1.
        fit_report_: the passes of all components.

    Raises:
        OptionError: for no components, other objects, different likelihoods, or weights that are negative or all 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators import LinearizedLaplace
        >>> mixture = Mixture([LinearizedLaplace(nn.Linear(3, 2), "regression") for _ in range(4)])
        >>> mixture = mixture.fit([(torch.randn(8, 3), torch.randn(8, 2))])
        >>> mixture.covariance(torch.randn(5, 3)).shape
        torch.Size([5, 2, 2])
    """

    def __init__(self, estimators: Sequence[UncertaintyEstimator], *, weights: Sequence[float] | None = None) -> None:
        self.estimators = _checked_estimators(estimators)
        self.weights = _checked_weights(weights, len(self.estimators))
        self._take_options_of(self.estimators[0])

    def _take_options_of(self, first: UncertaintyEstimator) -> None:
        prior = {"prior_precision": first.prior_precision, "prior_mean": first.prior_mean}
        super().__init__(first.model, first.likelihood, subset_of_weights=first.subset_of_weights, **prior)

    @property
    def uses_prior_precision(self) -> bool:  # type: ignore[override]
        """Whether a component is a posterior at its `prior_precision`."""
        return any(member.uses_prior_precision for member in self.estimators)

    @property
    def retrains(self) -> bool:  # type: ignore[override]
        """Whether a component trains networks."""
        return any(member.retrains for member in self.estimators)

    @property
    def batch_dependent(self) -> bool:  # type: ignore[override]
        """Whether the variance of a component depends on the other rows of the query."""
        return any(member.batch_dependent for member in self.estimators)

    @property
    def weights_(self) -> list[float]:
        """w_k, which sum to 1."""
        given = self.weights or [1.0] * len(self.members_)
        return [weight / sum(given) for weight in given]

    @classmethod
    def _option_names(cls) -> list[str]:
        return [name for name in super()._option_names() if name not in ("estimators", "estimator")]  # they check it

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        members = self._unfitted_members(objective, progress_bar=progress_bar)
        rows = PairLoader(objective.batches)
        self.members_ = [member.fit(rows) for member in track(members, "components", shown=progress_bar)]

    def _unfitted_members(self, objective: Objective, *, progress_bar: bool) -> list[UncertaintyEstimator]:  # noqa: ARG002
        return [clone(member, {}) for member in self.estimators]

    def _report_passes(self, objective: Objective) -> None:
        super()._report_passes(objective)
        if not self.counts_passes:
            return
        passes = dict(self.fit_report_.passes)
        for member in self.members_:
            for phase, count in member.fit_report_.passes.items():
                passes[phase] = passes.get(phase, 0.0) + count
        self.fit_report_ = FitReport(passes=passes)

    @property
    def counts_passes(self) -> bool:  # type: ignore[override]
        """Whether the passes of all components are counted."""
        return all(member.counts_passes for member in self.estimators)

    @property
    def passes_(self) -> float:
        """Forward and backward passes over the N training rows that all components have used so far."""
        return super().passes_ + sum(member.passes_ for member in self.members_)

    def _get_fit_state(self) -> Learned:
        tensors: dict[str, Tensor] = {}
        abouts: list[str] = []
        for i, member in enumerate(self.members_):
            state = member.state_dict()
            abouts.append(str(state.pop(ABOUT)))
            tensors |= {f"{i}/{name}": tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        return tensors, {"members": abouts}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        states: list[dict[str, Tensor | str]] = [{ABOUT: about} for about in learned["members"]]
        for key, tensor in tensors.items():
            i, _, name = key.partition("/")
            states[int(i)][name] = tensor
        members = self._members_to_load(objective, states)
        self.members_ = [member.load_state_dict(state) for member, state in zip(members, states, strict=True)]

    def _members_to_load(
        self,
        objective: Objective,  # noqa: ARG002
        states: Sequence[dict[str, Tensor | str]],  # noqa: ARG002
    ) -> list[UncertaintyEstimator]:
        """Return components that take these states, which may have further tensors for this method alone."""
        return [clone(member, {}) for member in self.estimators]

    def _on_data_attached(self, objective: Objective) -> None:
        for member in self.members_:
            member.attach_data(PairLoader(objective.batches))

    def _checked_outputs(self, x: PyTree) -> Tensor:
        for index, member in enumerate(self.members_[1:], 1):
            try:
                member._checked_outputs(x)
            except ModelChangedError as error:
                raise ModelChangedError(
                    error.expected, received=f"{error.received}, in component {index}", remedy=error.remedy
                ) from error
        return super()._checked_outputs(x)

    def _mean(self, x: PyTree) -> Tensor:
        return self._averaged(self._means(x)).reshape(self.network_.shaped_outputs(x).shape)

    def _means(self, x: PyTree) -> Tensor:
        """Return μ_k, (K, M, C)."""
        return torch.stack([member._mean(x).flatten(1) for member in self.members_])

    def _moments(self, x: PyTree) -> tuple[Tensor, Tensor]:
        """Return μ_k and the variances of the components, (K, M, C) each."""
        found = [member._mean_and_variance(x) for member in self.members_]
        means, variances = (torch.stack([one.flatten(1) for one in part]) for part in zip(*found, strict=True))
        return means, variances

    def _averaged(self, values: Tensor) -> Tensor:
        """Return Σ_k w_k v_k of values (K, ...)."""
        average: Tensor = torch.tensordot(values.new_tensor(self.weights_), values, dims=1)
        return average

    def _deviations(self, means: Tensor, dtype: torch.dtype) -> Tensor:
        """Return μ_k − mean, (K, M, C)."""
        means = means.to(dtype)
        return means - self._averaged(means)

    def _variance(self, x: PyTree) -> Tensor:
        return self._mean_and_variance(x)[1]

    def _mean_and_variance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        means, variances = self._moments(x)
        deviations = self._deviations(means, variances.dtype)
        return self._averaged(means), self._averaged(variances + deviations.square())  # within + between

    def _covariance(self, x: PyTree) -> Tensor:
        within = torch.stack([member._covariance(x) for member in self.members_])
        d = self._deviations(self._means(x), within.dtype)
        return self._averaged(within + torch.einsum("kmc,kmd->kmcd", d, d))

    def _joint_covariance(self, x: PyTree, f: Tensor) -> Tensor:
        within = torch.stack([member._joint_covariance(x, f) for member in self.members_])
        d = self._deviations(self._means(x), within.dtype)
        return self._averaged(within + torch.einsum("kmc,knd->kmcnd", d, d))

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        slopes = ComposedNetwork(self.network_, of).function_jacobian(x, at=self._mean(x).flatten(1))
        return variance_by_covariance(slopes, self._covariance(x))

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        w = torch.tensor(self.weights_, dtype=torch.float64, device=generator.device)
        component = torch.multinomial(w, n_samples, replacement=True, generator=generator)
        parts = [
            member._sample(x, int((component == k).sum()), generator).flatten(2)
            for k, member in enumerate(self.members_)
            if bool((component == k).any())
        ]
        order = torch.empty_like(component)
        order[component.argsort(stable=True)] = torch.arange(n_samples, device=component.device)
        return torch.cat(parts)[order]  # in the order in which the components were drawn

    @exclusively
    def predict(self, x: PyTree, *, link_approx: str | None = None, n_samples: int | None = None) -> Prediction:
        """Return the predictive distribution of the mixture.

        Regression has the mean and variance of the mixture, and the variance plus σ².

        Args:
            x: M query rows.
            link_approx: for classification and binary, "probit" averages the probabilities of the components by the
                probit approximation, "mc" averages over function samples of the components. None: "mc" if the
                components are sets of networks, such as SWAG or DeepEnsemble, else "probit".
            n_samples: the number of function samples of all components for "mc", at least one per component of positive
                weight. None: each network once if the components are sets of equally many networks with equal weights,
                else 100.

        Returns:
            The prediction.

        Raises:
            OptionError: for an unknown `link_approx`.
            UnsupportedError: for "mc" if a component has no function samples.
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        return self._finish_prediction(self.predict_uncalibrated(x, link_approx=link_approx, n_samples=n_samples))

    @exclusively
    def predict_uncalibrated(
        self, x: PyTree, *, link_approx: str | None = None, n_samples: int | None = None
    ) -> Prediction:
        checked_choice("link_approx", link_approx, ("probit", "mc", None), remedy="leave it out.")
        x = self._prepare_query(x)
        shape = self._check_query(x)
        if self.likelihood.kind == "regression":
            return self.likelihood.predict(*self._shaped_moments(x, shape), None)
        sets_of_networks = all(isinstance(member, MembersEstimator) for member in self.members_)
        if link_approx == "mc" or (link_approx is None and sets_of_networks):
            samples = self._to_output_dtype(self._component_samples(x, n_samples).reshape(-1, *shape))
            made = self.likelihood.predict(*self._shaped_moments(x, shape), samples)
            return replace(made, samples=samples)
        means, variances = self._moments(x)
        return mixture_of_gaussians(
            means.reshape(-1, *shape).transpose(0, 1),
            self._to_output_dtype(variances).reshape(-1, *shape).transpose(0, 1),
            self.weights_,
            kind=self.likelihood.kind,
            class_dim=getattr(self.likelihood, "class_dim", -1),
        )

    def _shaped_moments(self, x: PyTree, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the mixture in the shape and dtype of the outputs."""
        mean, variance = self._mean_and_variance(x)
        return mean.reshape(shape), self._to_output_dtype(variance).reshape(shape)

    def _component_samples(self, x: PyTree, n_samples: int | None) -> Tensor:
        """Return function samples of the mixture, (S, M, C), whose numbers per component follow the weights."""
        if n_samples is None and len(set(self.weights_)) == 1:
            sets = [member._members(x) for member in self.members_ if isinstance(member, MembersEstimator)]
            if len(sets) == len(self.members_) and len({len(members) for members in sets}) == 1:
                return torch.cat(sets)
        n = checked_integer("n_samples", _SAMPLES if n_samples is None else n_samples, at_least=len(self.members_))
        counts = _apportioned(self.weights_, n)
        return torch.cat(
            [
                member._sample(x, count, self._generator(seed)).flatten(2)
                for member, count, seed in zip(self.members_, counts, member_seeds(0, len(counts)), strict=True)
                if count
            ]
        )


class RetrainedMixture(Mixture):
    """Mixture of one method at several networks, which `fit` trains as `DeepEnsemble` does.

        model_1 = the given model, model_2 ... model_K = make_model() trained by `recipe` on the same loss and prior

    With SWAG this is MultiSWAG (Wilson and Izmailov 2020), with LinearizedLaplace or LastLayerLaplace a mixture of
    Laplace approximations (Eschenhagen et al. 2021).

    All weights of the networks are trained, so that the prior of the method must have a precision and a mean for each
    of them, also if it has a `subset_of_weights`: numbers, or mappings with an entry "*".

    Args:
        estimator: the method at the given model. The others are copies of it with another model, and if it is a
            set of networks with a seed, such as SWAG, with the seeds that follow.
        make_model: builds a new network of the architecture of the model with weights from the global random state,
            which `fit` restores.
        recipe: how to train a network; use the recipe of the model.
        n_members: the number K >= 2 of networks, including the model.
        seed: the seed of initialisations and orders of the rows.

    Attributes:
        members_: the fitted components.
        weights_: 1/K each.
        fit_report_: the passes of all components, including the training of the networks.

    Raises:
        OptionError: for another object; `fit` raises it for a prior that does not cover all weights. `fit` raises
            ModelError for a network of another architecture.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators import LastLayerLaplace
        >>> from estimators.training import Recipe
        >>> laplace = LastLayerLaplace(nn.Linear(3, 2), "regression")
        >>> options = {"make_model": lambda: nn.Linear(3, 2), "recipe": Recipe(epochs=2), "n_members": 3}
        >>> mixture = RetrainedMixture(laplace, **options).fit([(torch.randn(8, 3), torch.randn(8, 2))])
        >>> len(mixture.members_)
        3
    """

    def __init__(
        self,
        estimator: UncertaintyEstimator,
        *,
        make_model: MakeModel,
        recipe: Recipe,
        n_members: int = _N_MEMBERS,
        seed: int = 0,
    ) -> None:
        self.estimator = _checked_estimators([estimator])[0]
        self.estimators, self.weights = [self.estimator], None
        made = checked_make_model(make_model)
        if made is None:
            raise OptionError("make_model, a function", received="None", remedy="make_model=lambda: MyNetwork(...).")
        self.make_model = made
        self.recipe = checked_instance("recipe", recipe, Recipe, remedy="Recipe(epochs=100).")
        self.n_members, self.seed = checked_integer("n_members", n_members, at_least=2), checked_seed(seed)
        self._take_options_of(self.estimator)

    @property
    def retrains(self) -> bool:  # type: ignore[override]
        """Whether a fit trains networks: always."""
        return True

    def _unfitted_members(self, objective: Objective, *, progress_bar: bool) -> list[UncertaintyEstimator]:
        retraining = Retraining(self.make_model, self.recipe, self.prior_precision, prior_mean=self.prior_mean)
        trained: list[nn.Module] = []
        for seed in track(member_seeds(self.seed, self.n_members - 1), "networks", shown=progress_bar):
            trained.append(retraining.run(objective, seed, others=trained, progress_bar=False))
        return self._copies_at(trained)

    def _copies_at(self, others: Sequence[nn.Module]) -> list[UncertaintyEstimator]:
        """Return the method at the model and at the other networks, not fitted."""
        seeded = isinstance(self.estimator, MembersEstimator) and "seed" in constructor_options(type(self.estimator))
        copies = [clone(self.estimator, {})]
        for i, model in enumerate(others, 1):
            options: dict[str, Any] = {"seed": self.estimator.seed + i} if seeded else {}  # type: ignore[attr-defined]
            copies.append(clone(self.estimator, {"model": model, **options}))
        return copies

    def _refit(self, fitted: Self, objective: Objective, changed: frozenset[str]) -> None:
        """Keep the networks if only options of the method have changed."""
        of_method = [name for name in changed if name.startswith("estimator.")]
        if len(of_method) < len(changed):
            super()._refit(fitted, objective, changed)
        else:
            inner = {name.removeprefix("estimator."): self._inner_option(name) for name in of_method}
            self.members_ = [member.clone_with(**inner) for member in fitted.members_]

    def _inner_option(self, name: str) -> Any:  # noqa: ANN401
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def _get_fit_state(self) -> Learned:
        tensors, learned = super()._get_fit_state()
        for i, member in enumerate(self.members_[1:], 1):
            tensors |= {f"{i}/{_NETWORK}{name}": t for name, t in tensors_by_name(member.model).items()}
        return tensors, learned

    def _members_to_load(
        self, objective: Objective, states: Sequence[dict[str, Tensor | str]]
    ) -> list[UncertaintyEstimator]:
        networks = []
        for state in states[1:]:
            names = [name for name in state if name.startswith(_NETWORK)]
            tensors = {name.removeprefix(_NETWORK): state.pop(name) for name in names}
            networks.append(self._network_with(tensors, objective))
        return self._copies_at(networks)

    def _network_with(self, tensors: dict[str, Any], objective: Objective) -> nn.Module:
        """Return a network with these parameters and buffers."""
        with preserved_random_state():
            made = unwrapped(self.make_model()).to(objective.theta).eval()
        own = dict([*made.named_parameters(), *made.named_buffers()])
        with torch.no_grad():
            for name, plain in plain_names(made, own):
                own[name].copy_(tensors[plain])
        return made


_NETWORK = "network:"
"""Prefix of the tensors of a network in the state of its component."""


def _apportioned(weights: Sequence[float], n: int) -> list[int]:
    """Return n split by the weights into whole numbers, by the largest remainders, at least 1 for a positive weight."""
    shares = [weight * n for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k])
    for k in by_remainder[: n - sum(counts)]:
        counts[k] += 1
    for k, weight in enumerate(weights):
        if weight > 0 and not counts[k]:
            counts[counts.index(max(counts))] -= 1
            counts[k] = 1
    return counts


def _checked_estimators(estimators: Iterable[UncertaintyEstimator]) -> list[UncertaintyEstimator]:
    listed = list(estimators) if isinstance(estimators, Iterable) else [estimators]
    strange = [member for member in listed if not isinstance(member, UncertaintyEstimator)]
    if strange or not listed:
        raise OptionError(
            "estimators, a list of at least one UncertaintyEstimator",
            received=f"a {type(strange[0]).__name__} in it" if strange else "an empty list",
            remedy="[LinearizedLaplace(model_1, ...), LinearizedLaplace(model_2, ...)].",
        )
    first = described(listed[0].likelihood)
    for index, member in enumerate(listed):
        if described(member.likelihood) != first:
            raise OptionError(
                f"estimators with one likelihood, {listed[0].likelihood!r}",
                received=f"{member.likelihood!r} at index {index}",
                remedy="pass the same likelihood to each.",
            )
    return listed


def _checked_weights(weights: Sequence[float] | None, n: int) -> list[float] | None:
    if weights is None:
        return None
    numbers = [as_number(weight) for weight in weights]
    listed = [float(number) for number in numbers if number is not None and 0 <= number < float("inf")]
    if len(listed) != len(numbers) or len(listed) != n or sum(listed) <= 0:
        raise OptionError(
            f"weights, {n} numbers >= 0 that are not all 0",
            received=shown(weights),
            remedy="None for equal weights, or one number per estimator.",
        )
    return listed
