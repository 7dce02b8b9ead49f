"""The estimator under test: its factory, its declared capabilities, and its results on the kit's cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from estimators.errors import ModelError, OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.testing.cases import CASES, CPU, Case
from estimators.testing.networks import Array
from estimators.testing.outcomes import CheckFailure, NotApplicable

__all__ = ["UNSUPPORTED_ERRORS", "Capabilities", "EstimatorUnderTest", "Make", "as_array", "if_supported"]

Make = Callable[..., UncertaintyEstimator]
UNSUPPORTED_ERRORS = (OptionError, UnsupportedError)
"""The errors by which an estimator rejects a model, an option or a query that it does not support."""


@dataclass(frozen=True)
class Capabilities:
    """The properties that an estimator declares, and the tolerances of the checks.

    Args:
        exact: the variance is J A⁻¹ Jᵀ with A the "ggn" or the "hessian" over all weights, or the GGN over the
            "last_layer"; None for an approximation.
        prior_of: the weights with a Gaussian posterior, "all" or "last_layer"; None if there is none (ensembles).
        noise: the relative Monte-Carlo or optimisation error of a variance, 0 for none.
        tolerance: the relative tolerance in float64.
        n_samples: the number of function samples whose moments are compared.

    Example:
        >>> Capabilities("ggn", "all", noise=0.0, tolerance=1e-6, n_samples=2000).exact
        'ggn'
    """

    exact: str | None
    prior_of: str | None
    noise: float
    tolerance: float
    n_samples: int


@dataclass
class EstimatorUnderTest:
    """An estimator under test. Fits are cached, so that several checks share one.

    Args:
        make: (model, likelihood, *, prior_precision) to an estimator that is not fitted.
        capabilities: the declared properties.
        adapt: converts the kit's networks.
        device: the device of networks and data.

    Example:
        >>> from estimators import LinearizedLaplace
        >>> capabilities = Capabilities("ggn", "all", noise=0.0, tolerance=1e-6, n_samples=2000)
        >>> tested = EstimatorUnderTest(LinearizedLaplace, capabilities, adapt=lambda model: model)
        >>> tested.variance(tested.cases["regression"]).shape
        (7, 2)
    """

    make: Make
    capabilities: Capabilities
    adapt: Callable[[nn.Module], nn.Module]
    device: torch.device = CPU
    _fits: dict[str, UncertaintyEstimator] = field(default_factory=dict)

    @cached_property
    def cases(self) -> dict[str, Case]:
        """The kit's problems by name, on the device."""
        return {name: replace(case, device=self.device) for name, case in CASES.items()}

    def model(self, case: Case) -> nn.Module:
        """Return a new network for a case.

        Args:
            case: a problem of the kit.

        Returns:
            The adapted network in eval mode.
        """
        return self.adapt(case.module()).to(case.device).eval()

    def build(self, case: Case, model: nn.Module | None = None) -> UncertaintyEstimator:
        """Return a new estimator.

        Args:
            case: a problem of the kit.
            model: the network; None: a new one of the case.

        Returns:
            The estimator, not fitted.

        Raises:
            NotApplicable: if the estimator rejects the likelihood or the prior.
        """
        model = self.model(case) if model is None else model
        try:
            return self.make(model, case.likelihood, prior_precision=case.delta)
        except UNSUPPORTED_ERRORS as error:
            raise NotApplicable(f"rejected: {error}") from error

    def fit(
        self,
        case: Case,
        model: nn.Module | None = None,
        loader: Iterable[Any] | None = None,
        *,
        may_be_rejected: bool = False,
    ) -> UncertaintyEstimator:
        """Return a new fit.

        Args:
            case: a problem of the kit.
            model: the network; None: a new one of the case.
            loader: the training data; None: those of the case.
            may_be_rejected: whether a ModelError also means that the check does not apply, for an unusual network.

        Returns:
            The fitted estimator.

        Raises:
            NotApplicable: if the estimator rejects the case or the network.
        """
        estimator = self.build(case, model)
        rejections = (*UNSUPPORTED_ERRORS, ModelError) if may_be_rejected else UNSUPPORTED_ERRORS
        try:
            return estimator.fit(case.loader if loader is None else loader)
        except rejections as error:
            raise NotApplicable(f"rejected: {error}") from error

    def fitted(self, case: Case) -> UncertaintyEstimator:
        """Return the cached fit of a case, which is only for queries.

        Args:
            case: a problem of the kit.

        Returns:
            The fitted estimator.

        Raises:
            NotApplicable: if the estimator rejects the case.
        """
        if case.name not in self._fits:
            self._fits[case.name] = self.fit(case)
        return self._fits[case.name]

    def variance(self, case: Case) -> Array:
        """Return the variance (M, C) of the cached fit at the queries.

        Args:
            case: a problem of the kit.

        Returns:
            (M, C) in float64.
        """
        return as_array(self.fitted(case).variance(case.queries))

    def covariance(self, case: Case) -> Array:
        """Return the covariance (M, C, C) of the cached fit at the queries.

        Args:
            case: a problem of the kit.

        Returns:
            (M, C, C) in float64.

        Raises:
            NotApplicable: if the estimator has no covariance.
        """
        return as_array(if_supported(lambda: self.fitted(case).covariance(case.queries)))

    def samples(self, case: Case) -> Array:
        """Return function samples (S, M, C) of the cached fit at the queries.

        Args:
            case: a problem of the kit.

        Returns:
            (S, M, C) in float64.

        Raises:
            NotApplicable: if the estimator has no function samples.
        """
        estimator, n = self.fitted(case), self.capabilities.n_samples
        return as_array(if_supported(lambda: estimator.sample(case.queries, n)))

    @property
    def exact(self) -> str:
        """The curvature for which the variance is exact.

        Raises:
            NotApplicable: for an approximation.
        """
        if self.capabilities.exact is None:
            raise NotApplicable("an approximation")
        return self.capabilities.exact

    @property
    def prior_of(self) -> str:
        """The weights with a Gaussian posterior.

        Raises:
            NotApplicable: if there is none.
        """
        if self.capabilities.prior_of is None:
            raise NotApplicable("has no Gaussian posterior over weights")
        return self.capabilities.prior_of

    def rtol(self, case: Case | None = None) -> float:
        """Return the relative tolerance of a variance.

        Args:
            case: a problem, whose dtype counts; None for float64.

        Returns:
            The tolerance, including five times the declared noise.
        """
        single = case is not None and case.dtype != torch.float64
        return (
            max(2e-3, self.capabilities.tolerance) if single else self.capabilities.tolerance
        ) + 5 * self.capabilities.noise

    def compare(self, what: str, received: Array, expected: Array, *, fault: str, rtol: float | None = None) -> None:
        """Compare arrays entry by entry.

        Args:
            what: the compared quantity, in words.
            received: the result of the estimator.
            expected: the expected array, of the same shape.
            fault: the likely fault of a difference.
            rtol: the tolerance relative to an entry, or to a thousandth of the largest entry if that is larger. None:
                `self.rtol()`.

        Raises:
            CheckFailure: if shapes or entries differ.
        """
        rtol = self.rtol() if rtol is None else rtol
        if received.shape != expected.shape:
            raise CheckFailure(f"{what} of shape {expected.shape}", received=f"{received.shape}", fault=fault)
        allowed = rtol * np.maximum(np.abs(expected), 1e-3 * np.abs(expected).max())
        worst = np.unravel_index(np.argmax(np.abs(received - expected) - allowed), expected.shape)
        if not np.abs(received - expected)[worst] <= allowed[worst]:
            location = ", ".join(str(int(i)) for i in worst)
            raise CheckFailure(
                f"{what}: {expected[worst]:.6g} at [{location}], to {rtol:.1g}",
                received=f"{received[worst]:.6g}, a mean ratio of {_ratio(received, expected):.4g} over all",
                fault=fault,
            )


def _ratio(received: Array, expected: Array) -> float:
    total = float(np.abs(expected).mean())
    return float(np.abs(received).mean()) / total if total else float("inf")


def if_supported(query: Callable[[], Tensor]) -> Tensor:
    """Return the result of a query. Raises NotApplicable if the estimator does not support it."""
    try:
        return query()
    except UNSUPPORTED_ERRORS as error:
        raise NotApplicable(f"not supported: {error}") from error


def as_array(tensor: Tensor) -> Array:
    """Return a tensor as a float64 array."""
    return tensor.detach().cpu().double().numpy()
