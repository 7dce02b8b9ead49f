"""The trained network with a softmax temperature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from estimators.baselines.map import MAP
from estimators.data.training_data import TrainingData
from estimators.errors import NotConvergedWarning, UnsupportedError
from estimators.estimator.fit_report import PassReport
from estimators.likelihoods import Likelihood
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.persistence.state import Learned
from estimators.runtime.optional import optional_module

__all__ = ["TemperatureScaling"]

_SMALLEST, _LARGEST = 1e-2, 1e2


class TemperatureScaling(MAP):
    """The trained network f/T, with the temperature T that fits held-out rows best (Guo et al. 2017).

        T = argmin Σ −log p(y | f(x)/T) over the validation rows          variance(x) = 0

    One number for all outputs, between 0.01 and 100; the loss is convex in 1/T. Outputs, means and samples are f/T.

    Args:
        validation: a re-iterable loader of (x, y) that the network was not trained on. A saved fit has its temperature,
            and may be loaded with any: data are not compared.

    Fitted: `temperature_`; `fit_report_`, in which a forward of the validation rows counts as one of training rows.
    Warns: NotConvergedWarning where T ends at a bound, as it does where every row is classified rightly.
    Errors: UnsupportedError for regression; those of `fit` for either loader.
    """

    fit_report_: PassReport
    not_compared = frozenset({"validation"})

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        validation: Iterable[Any],
        prior_precision: float | Mapping[str, float] = 1.0,
    ) -> None:
        super().__init__(model, likelihood, prior_precision=prior_precision)
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
        self.temperature_ = best_temperature(self.likelihood, held_out)
        self.fit_report_ = PassReport.of(objective)

    def _learned(self) -> Learned:
        return {}, {"temperature": self.temperature_, "passes": self.fit_report_.passes}

    def _restore(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        self.temperature_, self.fit_report_ = learned["temperature"], PassReport(passes=learned["passes"])

    def _mean(self, x: PyTree) -> Tensor:
        return super()._mean(x) / self.temperature_

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        return super()._sample(x, n_samples, generator) / self.temperature_


def best_temperature(likelihood: Likelihood, held_out: list[tuple[Tensor, Tensor]]) -> float:
    """T of the least −log p(y | f/T), summed over pairs of outputs f (B, C) and targets y."""
    minimize_scalar = optional_module("scipy.optimize", purpose="fit a temperature", install="scipy").minimize_scalar

    def loss(log_temperature: float) -> float:
        parts = [likelihood.nll(f / math.exp(log_temperature), y).double().sum() for f, y in held_out]
        return float(torch.stack(parts).sum())

    bounds = math.log(_SMALLEST), math.log(_LARGEST)
    found = float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
    if min(found - bounds[0], bounds[1] - found) < 1e-3:
        warnings.warn(
            f"the softmax temperature ends at a bound, {math.exp(found):.3g}: the validation rows do not determine "
            "one; use more of them, or MAP",
            NotConvergedWarning,
            stacklevel=2,
        )
    return math.exp(found)
