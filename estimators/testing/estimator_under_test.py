"""The estimator under test: how it is made, what it claims, and what it gives on the kit's cases."""

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
"""What an estimator says of something that it does not have."""


@dataclass(frozen=True)
class Capabilities:
    """What an estimator claims.

    exact: the variance is J A⁻¹ Jᵀ with A the "ggn" or the "hessian" over all weights, or the GGN over the
        "last_layer"; None for an approximation.
    prior_of: the weights over which it has a Gaussian posterior, "all" or "last_layer"; None for none (ensembles).
    noise: relative Monte-Carlo or optimisation error of a variance, 0 for none.
    tolerance: relative, in float64. n_samples: how many function samples to compare moments of.
    """

    exact: str | None
    prior_of: str | None
    noise: float
    tolerance: float
    n_samples: int


@dataclass
class EstimatorUnderTest:
    """An estimator by its factory, and the device that it is on; fits are kept, so that many checks share one."""

    make: Make
    claims: Capabilities
    adapt: Callable[[nn.Module], nn.Module]
    device: torch.device = CPU
    _fits: dict[str, UncertaintyEstimator] = field(default_factory=dict)

    @cached_property
    def cases(self) -> dict[str, Case]:
        """The kit's problems by name, on the device."""
        return {name: replace(case, device=self.device) for name, case in CASES.items()}

    def model(self, case: Case) -> nn.Module:
        """A new network for a case."""
        return self.adapt(case.module()).to(case.device).eval()

    def build(self, case: Case, model: nn.Module | None = None) -> UncertaintyEstimator:
        """A new estimator; NotApplicable where it refuses the likelihood or the prior."""
        model = self.model(case) if model is None else model
        try:
            return self.make(model, case.likelihood, prior_precision=case.delta)
        except UNSUPPORTED_ERRORS as error:
            raise NotApplicable(f"refuses it: {error}") from error

    def fit(
        self,
        case: Case,
        model: nn.Module | None = None,
        loader: Iterable[Any] | None = None,
        *,
        special: bool = False,
    ) -> UncertaintyEstimator:
        """A new fit; NotApplicable where it refuses, for a `special` network also by ModelError."""
        estimator = self.build(case, model)
        refusals = (*UNSUPPORTED_ERRORS, ModelError) if special else UNSUPPORTED_ERRORS
        try:
            return estimator.fit(case.loader if loader is None else loader)
        except refusals as error:
            raise NotApplicable(f"refuses it: {error}") from error

    def fitted(self, case: Case) -> UncertaintyEstimator:
        """A fit to share: only to be queried."""
        if case.name not in self._fits:
            self._fits[case.name] = self.fit(case)
        return self._fits[case.name]

    def variance(self, case: Case) -> Array:
        """Of the shared fit, at the queries, (M, C)."""
        return as_array(self.fitted(case).variance(case.queries))

    def covariance(self, case: Case) -> Array:
        """Likewise, (M, C, C)."""
        return as_array(if_supported(lambda: self.fitted(case).covariance(case.queries)))

    def samples(self, case: Case, *, seed: int = 0) -> Array:
        """Likewise, (S, M, C)."""
        estimator, n = self.fitted(case), self.claims.n_samples
        return as_array(if_supported(lambda: estimator.sample(case.queries, n, seed=seed)))

    @property
    def exact(self) -> str:
        """Of the claims; NotApplicable for an approximation."""
        if self.claims.exact is None:
            raise NotApplicable("makes no claim to be exact")
        return self.claims.exact

    @property
    def prior_of(self) -> str:
        """Of the claims; NotApplicable where there is no posterior over weights."""
        if self.claims.prior_of is None:
            raise NotApplicable("has no Gaussian posterior over weights")
        return self.claims.prior_of

    def slack(self, case: Case | None = None) -> float:
        """How far two variances of one posterior may differ, relative."""
        single = case is not None and case.dtype != torch.float64
        return (max(2e-3, self.claims.tolerance) if single else self.claims.tolerance) + 5 * self.claims.noise

    def compare(self, what: str, received: Array, expected: Array, *, fault: str, slack: float | None = None) -> None:
        """Mismatch where an entry differs by more than the slack, of itself or of a thousandth of the largest."""
        slack = self.slack() if slack is None else slack
        if received.shape != expected.shape:
            raise CheckFailure(f"{what} of shape {expected.shape}", received=f"{received.shape}", fault=fault)
        allowed = slack * np.maximum(np.abs(expected), 1e-3 * np.abs(expected).max())
        worst = np.unravel_index(np.argmax(np.abs(received - expected) - allowed), expected.shape)
        if not np.abs(received - expected)[worst] <= allowed[worst]:
            place = ", ".join(str(int(i)) for i in worst)
            raise CheckFailure(
                f"{what}: {expected[worst]:.6g} at [{place}], to {slack:.1g}",
                received=f"{received[worst]:.6g}, a mean ratio of {_ratio(received, expected):.4g} over all",
                fault=fault,
            )


def _ratio(received: Array, expected: Array) -> float:
    total = float(np.abs(expected).mean())
    return float(np.abs(received).mean()) / total if total else float("inf")


def if_supported(question: Callable[[], Tensor]) -> Tensor:
    """The answer; NotApplicable where there is none."""
    try:
        return question()
    except UNSUPPORTED_ERRORS as error:
        raise NotApplicable(f"has none: {error}") from error


def as_array(tensor: Tensor) -> Array:
    """In float64."""
    return tensor.detach().cpu().double().numpy()
