"""Temperature scaling of the trained network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from estimators.baselines.map import MAP
from estimators.data.training_data import TrainingData
from estimators.errors import NotConvergedWarning, UnsupportedError
from estimators.likelihoods import Likelihood
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import PriorOption, checked_number
from estimators.persistence.state import Learned
from estimators.runtime.optional import optional_module

__all__ = ["TEMPERATURE_BOUNDS", "TemperatureScaling", "best_temperature"]

TEMPERATURE_BOUNDS = (1e-2, 1e2)
"""The smallest and largest softmax temperature that is considered."""


class TemperatureScaling(MAP):
    """The trained network f/T, with the temperature T that fits held-out rows best (Guo et al. 2017, section 4.2).

        T = argmin Σ −log p(y | f(x)/T) over the validation rows          variance(x) = 0

    T is one number for all outputs, between 0.01 and 100. Outputs, means and samples are f/T. With `shrinkage` w, the
    loss has a penalty w (log T)².

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        validation: a re-iterable loader of (x, y) that the network was not trained on. A saved fit contains its
            temperature and may be loaded with any validation loader.
        shrinkage: weight w ≥ 0 of the penalty, in nats. If every validation row is classified correctly, T is at its
            bound without it; the comparison uses `estimators.tuning.shrinkage_of_few_rows`.

    Attributes:
        temperature_: T.
        fit_report_: the passes of the fit; validation rows count as training rows do.

    Raises:
        UnsupportedError: for regression.

    Warns:
        NotConvergedWarning: in `fit`, if T ends at a bound, for instance because every row is classified correctly.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> rows = [(torch.randn(50, 3), torch.randint(0, 2, (50,)))]
        >>> scaled = TemperatureScaling(nn.Linear(3, 2), "classification", validation=rows).fit(rows)
        >>> 0.01 <= scaled.temperature_ <= 100
        True
    """

    not_compared = frozenset({"validation"})

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        validation: Iterable[Any],
        prior_precision: PriorOption = 1.0,
        shrinkage: float = 0.0,
    ) -> None:
        super().__init__(model, likelihood, prior_precision=prior_precision)
        self.shrinkage = checked_number("shrinkage", shrinkage, at_least=0, remedy="0, or shrinkage_of_few_rows(kind).")
        if self.likelihood.kind == "regression":
            raise UnsupportedError(
                "a likelihood of classes, whose logits have a temperature",
                received=repr(self.likelihood),
                remedy="MAP with sigma_noise tuned on the validation rows: Gaussian(sigma_noise=their RMSE).",
            )
        self.validation = validation

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:  # noqa: ARG002
        network = objective.network
        with network.pass_counter.phase("validation"):
            batches = TrainingData.checked(self.validation, network, self.likelihood)
            wide = algebra_dtype(network.theta.device)
            held_out = [(network.outputs(batch.x).to(wide), batch.y) for batch in batches]
        self.temperature_ = best_temperature(self.likelihood, held_out, self.shrinkage)
        if self.temperature_ in TEMPERATURE_BOUNDS:
            warnings.warn(
                f"the softmax temperature ends at a bound, {self.temperature_:.3g}: the validation rows do not "
                "determine one; use more of them, or MAP",
                NotConvergedWarning,
                stacklevel=2,
            )

    def _get_fit_state(self) -> Learned:
        return {}, {"temperature": self.temperature_}

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        self.temperature_ = learned["temperature"]

    def _mean(self, x: PyTree) -> Tensor:
        return super()._mean(x) / self.temperature_

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        return super()._sample(x, n_samples, generator) / self.temperature_


def best_temperature(likelihood: Likelihood, held_out: list[tuple[Tensor, Tensor]], shrinkage: float = 0.0) -> float:
    """Return the T within `TEMPERATURE_BOUNDS` that minimises −log p(y | f/T) + w (log T)².

    The loss is convex in β = 1/T, so T is at the root of the slope, or at a bound.

    Args:
        likelihood: of classes.
        held_out: pairs of finite outputs f (B, C) and targets y.
        shrinkage: w, in nats for all rows together.
    """
    brentq = optional_module("scipy.optimize", purpose="fit a temperature", install="scipy").brentq

    def slope(log_beta: float) -> float:
        beta = torch.tensor(math.exp(log_beta), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            loss = torch.stack([likelihood.nll(beta * f, y).double().sum() for f, y in held_out]).sum()
        by_log_beta = beta.detach() * torch.autograd.grad(loss, beta)[0]
        return float(by_log_beta) + 2 * shrinkage * log_beta  # (log T)² = (log β)²

    low, high = (-math.log(bound) for bound in reversed(TEMPERATURE_BOUNDS))
    if slope(low) >= 0:
        return TEMPERATURE_BOUNDS[1]
    if slope(high) <= 0:
        return TEMPERATURE_BOUNDS[0]
    return math.exp(-brentq(slope, low, high, xtol=1e-12, rtol=1e-12))
