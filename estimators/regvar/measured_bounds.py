"""An estimate between bounds of the variance whose error has been measured at rows with a known variance.

The bounds of a Krylov space are not tight at first. Where the variance lies between them is much the same at all rows.
So it is computed exactly at a few rows, the probes, and the estimate at every other row is

    v̂ = u − w₁ (u − l) − w₂ (u′ − u) − w₃ (l − l′)

with bounds l and u from the space, and l′ and u′ from a smaller leading space: a bound that has moved will move on. The
second and third term tell rows apart. Least squares of the relative error at the probes give the weights.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from estimators.models.functionals import Functional
from estimators.numerics.pytrees import PyTree
from estimators.persistence.state import Learned
from estimators.regvar.bounds import Bounds, LeadingSpace, VarianceBounds
from estimators.regvar.monte_carlo import MonteCarloVariance, with_diagonal

__all__ = ["MeasuredAccuracy", "MeasuredBounds"]

_RIDGE = 1e-3
"""Ridge on the weights relative to the mean squared regressor, which limits their noise from few probes."""
_ROUND_OFF = 1e-5
"""Distance of the bounds relative to the variance that has no weight in the least squares, since it may be round-off.

The bounds meet at the training rows of small data sets, but not at other rows.
"""


@dataclass(frozen=True)
class MeasuredAccuracy:
    """The weights of the estimate, and its error at the probes.

    Args:
        earlier: the smaller leading space.
        space: the space that was measured; a refined fit has a larger one.
        weights: w₁, w₂ and w₃.
        relative_error: root mean square of v̂/v − 1 at the probes, each left out of the least squares in turn.
        relative_bias: mean of v̂/v − 1 at training rows less that at rows unlike them, each probe left out in turn. It
            shifts one kind of rows against the other, and so the AUROC of out-of-distribution rows.
        n_probes: m.
        n_training: number of training rows among the probes.
        round_off: relative error that round-off may cause at other rows, from the condition number of A.
    """

    earlier: LeadingSpace
    space: LeadingSpace
    weights: tuple[float, ...]
    relative_error: float
    relative_bias: float
    n_probes: int
    n_training: int
    round_off: float = 0.0

    @property
    def total_error(self) -> float:
        """The measured error and round-off together, √(relative_error² + round_off²)."""
        return math.hypot(self.relative_error, self.round_off)

    @classmethod
    def of(
        cls,
        leading: tuple[LeadingSpace, LeadingSpace],
        found: list[Bounds],
        variance: Tensor,
        uncertainty: Tensor,
        training: Tensor,
    ) -> MeasuredAccuracy:
        """Fit the weights.

        Args:
            leading: the smaller and the measured space.
            found: bounds at the probes from these two.
            variance: the variance at the probes, (m,).
            uncertainty: relative error of `variance`, (m,).
            training: which of the probes are training rows, (m,), bool.
        """
        upper = found[1][1]
        regressors = _regressors(found) / variance[:, None]
        deficit = (upper - variance) / variance
        gram = regressors.T @ regressors
        ridge = _RIDGE * gram.diagonal().mean() + _ROUND_OFF**2
        gram = gram + ridge * torch.eye(len(gram)).to(gram)
        weights = torch.linalg.solve(gram, regressors.T @ deficit)
        leverage = (regressors * torch.linalg.solve(gram, regressors.T).T).sum(1)
        left_out = (regressors @ weights - deficit) / (1 - leverage).clamp_min(1 / max(1, len(deficit)))
        if len(deficit) <= len(weights):  # too few to leave one out: the whole distance counts
            left_out = regressors[:, 0]
        error = math.sqrt(float((left_out.square() + uncertainty.square()).mean())) if len(deficit) else math.inf
        like, unlike = left_out[training], left_out[~training]
        bias = float(unlike.mean() - like.mean()) if len(like) and len(unlike) else 0.0
        return cls(*leading, tuple(weights.tolist()), error, bias, len(deficit), len(like))

    @classmethod
    def restored(cls, content: dict[str, Any]) -> MeasuredAccuracy:
        """Return the accuracy from the dict of its fields, whose tuples JSON has made lists."""
        tuples = {name: tuple(content[name]) for name in ("earlier", "space", "weights")}
        return cls(**{**content, **tuples})

    def leading(self, rank: int) -> list[LeadingSpace]:
        """Return the leading spaces whose bounds the estimate needs, besides the whole space of this rank."""
        return [self.earlier] if self.space[0] == rank else [self.earlier, self.space]

    def estimate(self, bounds: list[Bounds]) -> Tensor:
        """Return v̂ from the bounds of the smaller and the measured space, clipped to those of the whole space."""
        upper = bounds[1][1]
        deficit = _regressors(bounds) @ torch.tensor(self.weights).to(upper)
        return (upper - deficit).clamp(*bounds[-1])


def _regressors(bounds: list[Bounds]) -> Tensor:
    """Return u − l, u′ − u and l − l′ in the last dimension, (..., 3)."""
    (lower_before, upper_before), (lower, upper) = bounds[:2]
    return torch.stack([upper - lower, upper_before - upper, lower - lower_before], -1)


class MeasuredBounds(MonteCarloVariance):
    """The variance between bounds of a Krylov space, with weights from probes. Function samples are those of the draws.

    Args:
        draws: the posterior draws.
        bounds: bounds of the smaller, the measured and the whole space.
        accuracy: weights and error.
    """

    def __init__(self, draws: MonteCarloVariance, bounds: VarianceBounds, accuracy: MeasuredAccuracy) -> None:
        super().__init__(draws.network, draws.displacement, draws.block, draws.rao_blackwell)
        self.bounds, self.accuracy = bounds, accuracy

    @property
    def round_off(self) -> float:
        """The relative error that round-off may cause at rows other than the probes."""
        return self.accuracy.round_off

    def state(self) -> Learned:
        tensors, learned = super().state()
        return {**tensors, **self.bounds.state()}, {**learned, "accuracy": asdict(self.accuracy)}

    def compose(self, of: Functional) -> MeasuredBounds:
        draws = super().compose(of)
        return MeasuredBounds(draws, replace(self.bounds, network=draws.network, block=draws.block), self.accuracy)

    def variance(self, x: PyTree) -> Tensor:
        return self.accuracy.estimate(self.bounds.variances(x))

    def variance_bounds(self, x: PyTree) -> Bounds:
        """Return lower and upper bound of the variance, (M, C) each."""
        return self.bounds.variance(x)

    def covariance(self, x: PyTree) -> Tensor:
        """Return the mean of both bounds with the estimated variance on the diagonal."""
        lower, upper = self.bounds.covariance(x)
        return with_diagonal(0.5 * (lower + upper), self.variance(x))

    def covariance_along(self, jacobian: Tensor) -> Tensor:
        variance = self.accuracy.estimate(self.bounds.variances_along(jacobian))
        lower, upper = self.bounds.covariance_along(jacobian)
        return with_diagonal(0.5 * (lower + upper), variance).to(jacobian.dtype)

    def standard_error(self, x: PyTree) -> Tensor:
        """Return the relative error times the variance, (M, C)."""
        return self.accuracy.total_error * self.variance(x)
