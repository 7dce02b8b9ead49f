"""The base class of methods whose posterior is a set of networks: moments, samples and predictions over members."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods.prediction import Prediction
from estimators.models.functionals import ComposedNetwork, Functional
from estimators.numerics.pytrees import PyTree
from estimators.option_checks import checked_choice, checked_integer

__all__ = ["MembersEstimator", "WeightMembersEstimator"]


class MembersEstimator(UncertaintyEstimator):
    """A posterior of S networks with functions f_s, equally probable.

        mean = (1/S) Σ_s f_s      p(y | x) = (1/S) Σ_s p(y | f_s(x))
        covariance = (1/(S−1)) Σ_s (f_s − mean)(f_s − mean)ᵀ

    The covariance is the unbiased estimate. A function of the outputs is linearized at their mean over the members. A
    member is the same function for every row and every call, so that the variance of a row does not depend on the other
    rows. Subclasses implement `_members`.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        prior_mean: θ₀, the mean of the prior: a number, a tensor (P,), or a mapping such as a state dict.
        subset_of_weights: "all", "last_layer", or names and patterns of the parameters that are uncertain.

    Attributes:
        fit_report_: the passes of the fit.
    """

    @abstractmethod
    def _members(self, x: PyTree) -> Tensor:
        """Return f_s(x) of all members at checked inputs, (S, M, C), detached."""

    def member_outputs(self, x: PyTree) -> Tensor:
        """Return the outputs f_s(x) of all members.

        Args:
            x: M query rows.

        Returns:
            (S, M, C), or (S, M, ...) for outputs of several dimensions.

        Raises:
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        x = self._prepare_query(x)
        shape = self._check_query(x)
        members = self._members(x)
        return members.reshape(len(members), *shape)

    def predict(self, x: PyTree, *, link_approx: str | None = None, n_samples: int | None = None) -> Prediction:
        """Return the predictive distribution of the mixture.

        Regression has the members' mean, and their variance plus σ².

        Args:
            x: M query rows.
            link_approx: for classification and binary, "mc" (the default) averages the members' probabilities, and
                "probit" uses their mean and variance.
            n_samples: the number of members to draw with replacement for "mc". None: each member once.

        Returns:
            The prediction, whose `samples` are the members (S, M, ...).

        Raises:
            OptionError: for an unknown `link_approx`.
            NotFittedError, ModelChangedError, DataError: as `variance`.
        """
        return self._finish_prediction(self.predict_uncalibrated(x, link_approx=link_approx, n_samples=n_samples))

    def predict_uncalibrated(
        self, x: PyTree, *, link_approx: str | None = None, n_samples: int | None = None
    ) -> Prediction:
        checked_choice("link_approx", link_approx, ("probit", "mc", None), remedy="leave it out.")
        members = self.member_outputs(x)
        samples = members if n_samples is None else self._draw_members(members, n_samples, seed=0)
        averaged = link_approx == "mc" or (link_approx is None and self.likelihood.kind != "regression")
        made = self.likelihood.predict(members.mean(0), members.var(0), samples if averaged else None)
        return replace(made, samples=samples)

    def _draw_members(self, members: Tensor, n_samples: int, *, seed: int) -> Tensor:
        """Return members drawn with replacement, (n_samples, ...)."""
        n_samples = checked_integer("n_samples", n_samples, at_least=1)
        return _resampled(members, n_samples, torch.Generator(members.device).manual_seed(seed))

    def _mean(self, x: PyTree) -> Tensor:
        return self._members(x).mean(0)

    def _variance(self, x: PyTree) -> Tensor:
        return self._members(x).var(0)

    def _mean_and_variance(self, x: PyTree) -> tuple[Tensor, Tensor]:
        members = self._members(x)
        return members.mean(0), members.var(0)

    def _covariance(self, x: PyTree) -> Tensor:
        members = self._members(x)
        deviations = members - members.mean(0)
        return torch.einsum("smc,smd->mcd", deviations, deviations) / (len(members) - 1)

    def _joint_covariance(self, x: PyTree, f: Tensor) -> Tensor:  # noqa: ARG002
        members = self._members(x)
        deviations = members - members.mean(0)
        return torch.einsum("smc,snd->mcnd", deviations, deviations) / (len(members) - 1)

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        members = self._members(x)
        slopes = ComposedNetwork(self.network_, of).function_jacobian(x, at=members.mean(0))
        return torch.einsum("mdc,smc->smd", slopes, members).var(0)

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        return _resampled(self._members(x), n_samples, generator)


class WeightMembersEstimator(MembersEstimator):
    """A posterior of S networks that differ in the chosen weights only, f_s(x) = f(θ_s, x).

    Frozen weights and buffers are those of the model. Subclasses implement `_member_weights`.
    """

    @abstractmethod
    def _member_weights(self) -> Iterable[Tensor]:
        """Return θ_s, (P,) each, the same in every call."""

    def _members(self, x: PyTree) -> Tensor:
        with torch.no_grad():
            return torch.stack([self.network_(theta, x) for theta in self._member_weights()])


def _resampled(members: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(len(members), (n_samples,), generator=generator, device=generator.device)
    return members[chosen]
