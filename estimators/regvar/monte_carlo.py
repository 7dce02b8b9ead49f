"""Variance estimates from posterior draws: their mean square, or an interpolation between bounds of the variance."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from estimators.errors import UnsupportedError
from estimators.models.functionals import ComposedNetwork, Functional
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree, select_rows
from estimators.objective.objective import Objective
from estimators.persistence.state import Learned
from estimators.regvar.bounds import Bounds, VarianceBounds
from estimators.regvar.probe_rows import random_training_rows
from estimators.regvar.rao_blackwell import ComposedBlock, RaoBlackwellBlock
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["BoundInterpolation", "ClippedMonteCarlo", "InterpolatedBounds", "MonteCarloVariance", "with_diagonal"]

_ROW_SHARE, _MIN_ROWS, _MAX_ROWS = 0.1, 16, 256  # training rows that the interpolation weight is computed from
_MAX_OUTPUTS = 32  # outputs per row for the interpolation weight; each costs a backward pass
_SEED = 0  # of the choice of these rows and of the combinations of outputs
_LOOSE_RATIO = 12.0  # upper over lower bound, above which interpolation is unreliable: docs/math.md, section 5


class MonteCarloVariance(VarianceEstimate):
    """The mean squared response of K posterior draws, plus the last-layer variance with Rao-Blackwellisation.

    Args:
        network: the network at θ̂.
        displacement: A⁻¹ξ of each draw, (K, P).
        block: the last-layer block, or None.
        rao_blackwell: a text that names the layer, or says why there is none.
    """

    def __init__(
        self, network: Network, displacement: Tensor, block: RaoBlackwellBlock | None, rao_blackwell: str
    ) -> None:
        self.network, self.displacement = network, displacement
        self.block, self.rao_blackwell = block, rao_blackwell

    def drawn_variance(self, x: PyTree) -> Tensor:
        """Return the part of the variance that the draws estimate, (M, C)."""
        return self.network.jvp(x, self.displacement).square().mean(0)

    def variance(self, x: PyTree) -> Tensor:
        drawn = self.drawn_variance(x)
        return drawn if self.block is None else self.block.variance(x) + drawn

    def covariance(self, x: PyTree) -> Tensor:
        response = self.network.jvp(x, self.displacement)
        drawn = torch.einsum("kmc,kmd->mcd", response, response) / len(response)
        return drawn if self.block is None else self.block.covariance(x) + drawn

    def compose(self, of: Functional) -> MonteCarloVariance:
        block = None if self.block is None else ComposedBlock.of(self.block, of)
        return MonteCarloVariance(ComposedNetwork(self.network, of), self.displacement, block, self.rao_blackwell)

    def joint_covariance(self, x: PyTree) -> Tensor:
        """Return the covariance between all outputs of all rows of x, (M, C, M, C)."""
        response = self.network.jvp(x, self.displacement)
        drawn = torch.einsum("kmc,knd->mcnd", response, response) / len(response)
        return drawn if self.block is None else self.block.joint_covariance(x).to(drawn.dtype) + drawn

    def covariance_along(self, jacobian: Tensor) -> Tensor:
        """Return J Σ Jᵀ (M, C, C) for a Jacobian J (M, C, P), differentiable in J."""
        response = jacobian @ self.displacement.to(jacobian.dtype).T
        drawn = response @ response.transpose(1, 2) / len(self.displacement)
        return drawn if self.block is None else self.block.covariance_along(jacobian) + drawn

    def sample_weights(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return samples θ − θ̂ (n_samples, P), of which `sample` with an equal generator is the response."""
        chosen = self.displacement[self._choose(n_samples, generator)]
        return chosen if self.block is None else chosen + self.block.sample_weights(n_samples, generator).to(chosen)

    def _choose(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return the indices (n_samples,) of random draws, each at most once."""
        if n_samples > len(self.displacement):
            raise UnsupportedError(
                f"at most {len(self.displacement)} samples, one per posterior draw",
                received=str(n_samples),
                remedy=f"PosteriorDraws(n_draws={n_samples}).",
            )
        device = self.displacement.device
        return torch.randperm(len(self.displacement), generator=generator, device=device)[:n_samples]

    def sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        response = self.network.jvp(x, self.displacement[self._choose(n_samples, generator)])
        if self.block is None:
            return response
        return response + self.block.sample(x, n_samples, generator).to(response.dtype)

    def state(self) -> Learned:
        block, last_layer = ({}, None) if self.block is None else self.block.state()
        return {"displacement": self.displacement, **block}, {
            "rao_blackwell": self.rao_blackwell,
            "last_layer": last_layer,
        }

    def standard_error(self, x: PyTree) -> Tensor:
        """Return √(2/K) times the part of the variance that the draws estimate, (M, C)."""
        return self.drawn_variance(x) * math.sqrt(2 / len(self.displacement))


@dataclass(frozen=True)
class BoundInterpolation:
    """The interpolation weight: the position of the draws' variance between the bounds, averaged over training rows.

    Args:
        weight: between 0 (the lower bound) and 1 (the upper bound).
        standard_error: Monte Carlo standard error of the weight.
        bound_ratio: upper over lower bound, the median over the rows and outputs used.
    """

    weight: float
    standard_error: float
    bound_ratio: float = 1.0

    @property
    def bounds_are_loose(self) -> bool:
        """Whether the bounds are too far apart for an interpolation to be reliable."""
        return self.bound_ratio > _LOOSE_RATIO

    @classmethod
    def of(cls, draws: MonteCarloVariance, bounds: VarianceBounds, objective: Objective) -> BoundInterpolation:
        """Compute the weight from a tenth of the training rows, and random combinations of their outputs if many."""
        parts = [_RowBounds.of(draws, bounds, x) for x in _some_rows(objective)]
        lower, upper = (torch.cat([getattr(part, name) for part in parts]) for name in ("lower", "upper"))
        distance = (upper - lower).sum()
        if not float(distance) > 1e-9 * float(upper.sum()):
            return cls(0.5, 0.5)  # the bounds are equal up to round-off
        weights = sum(part.excess for part in parts) / distance  # one per draw
        standard_error = float(weights.std()) / math.sqrt(len(weights)) if len(weights) > 1 else 0.5
        ratio = float((upper / lower.clamp_min(torch.finfo(lower.dtype).tiny)).median())
        return cls(float(weights.mean().clamp(0, 1)), min(0.5, standard_error), ratio)


@dataclass(frozen=True)
class _RowBounds:
    """Bounds at some rows of one batch, flattened, and the sum of each draw's excess over the lower bound, (K,)."""

    lower: Tensor
    upper: Tensor
    excess: Tensor

    @classmethod
    def of(cls, draws: MonteCarloVariance, bounds: VarianceBounds, x: PyTree) -> _RowBounds:
        combination = _random_combinations(draws.network, x)
        if combination is not None:
            draws = draws.compose(combination)
            bounds = replace(bounds, network=draws.network, block=draws.block)
        lower, upper = bounds.variance(x)
        response = draws.network.jvp(x, draws.displacement).square()  # (K, M, C)
        last_layer = torch.zeros_like(lower) if draws.block is None else draws.block.variance(x)
        return cls(lower.flatten(), upper.flatten(), response.sum((1, 2)) + (last_layer - lower).sum())


class InterpolatedBounds(MonteCarloVariance):
    """lower(x) + weight · (upper(x) − lower(x)), bounds from a Krylov space and the weight from posterior draws.

    The bounds hold at every x. Function samples are those of the draws.
    """

    clipped: ClassVar[bool] = False

    def __init__(self, draws: MonteCarloVariance, bounds: VarianceBounds, interpolation: BoundInterpolation) -> None:
        super().__init__(draws.network, draws.displacement, draws.block, draws.rao_blackwell)
        self.bounds, self.interpolation = bounds, interpolation

    def state(self) -> Learned:
        tensors, learned = super().state()
        which = {"interpolation": asdict(self.interpolation), "clipped": self.clipped}
        return {**tensors, **self.bounds.state()}, {**learned, **which}

    def compose(self, of: Functional) -> InterpolatedBounds:
        draws = super().compose(of)
        return type(self)(draws, replace(self.bounds, network=draws.network, block=draws.block), self.interpolation)

    def variance(self, x: PyTree) -> Tensor:
        lower, upper = self.bounds.variance(x)
        return torch.lerp(lower, upper, self.interpolation.weight)

    def variance_bounds(self, x: PyTree) -> Bounds:
        """Return lower and upper bound of the variance, (M, C) each."""
        return self.bounds.variance(x)

    def covariance(self, x: PyTree) -> Tensor:
        lower, upper = self.bounds.covariance(x)
        return torch.lerp(lower, upper, self.interpolation.weight)

    def covariance_along(self, jacobian: Tensor) -> Tensor:
        lower, upper = self.bounds.covariance_along(jacobian)
        return torch.lerp(lower, upper, self.interpolation.weight).to(jacobian.dtype)

    def standard_error(self, x: PyTree) -> Tensor:
        """Return the standard error that the weight causes, (M, C); the other error is limited by the bounds."""
        lower, upper = self.bounds.variance(x)
        return (upper - lower) * self.interpolation.standard_error


class ClippedMonteCarlo(InterpolatedBounds):
    """The mean squared response of posterior draws, clipped to the bounds of the variance.

    Used if the bounds are loose. The relative error of the draws is then √(2/K) plus that of the solver, at every x.
    """

    clipped = True

    def variance(self, x: PyTree) -> Tensor:
        lower, upper = self.bounds.variance(x)
        return MonteCarloVariance.variance(self, x).clamp(lower, upper)

    def covariance(self, x: PyTree) -> Tensor:
        """Return the correlations of the draws with `variance` on the diagonal."""
        return _with_clipped_diagonal(MonteCarloVariance.covariance(self, x), *self.bounds.variance(x))

    def covariance_along(self, jacobian: Tensor) -> Tensor:
        lower, upper = (bound.to(jacobian.dtype) for bound in self.bounds.variances_along(jacobian)[-1])
        return _with_clipped_diagonal(MonteCarloVariance.covariance_along(self, jacobian), lower, upper)

    def standard_error(self, x: PyTree) -> Tensor:
        return MonteCarloVariance.standard_error(self, x)


def with_diagonal(covariance: Tensor, variance: Tensor) -> Tensor:
    """Return the correlations of a covariance (M, C, C) with a variance (M, C) on the diagonal.

    A positive semidefinite matrix stays so: Σ ← Σ √(v vᵀ / d dᵀ), d its diagonal and v the variance.
    """
    before = covariance.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(covariance.dtype).tiny)
    scale = (variance / before).sqrt()
    return covariance * scale[:, :, None] * scale[:, None, :]


def _with_clipped_diagonal(drawn: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return the correlations of a covariance (M, C, C) with its diagonal clipped to bounds (M, C)."""
    return with_diagonal(drawn, drawn.diagonal(dim1=1, dim2=2).clamp(lower, upper))


def _some_rows(objective: Objective) -> list[PyTree]:
    """Return a tenth of the training rows, at random, those of each batch together."""
    wanted = min(_MAX_ROWS, max(_MIN_ROWS, int(_ROW_SHARE * objective.batches.n_data)))
    return random_training_rows(objective, wanted, torch.Generator().manual_seed(_SEED))


def _random_combinations(network: Network, x: PyTree) -> Functional | None:
    """Return a map of a row's outputs to random sums, or None if the outputs are few.

    The expected sum of the variances of the random sums is proportional to that of the outputs.
    """
    n_outputs, theta = network.outputs(select_rows(x, slice(0, 1))).shape[-1], network.theta
    if n_outputs <= _MAX_OUTPUTS:
        return None
    weights = torch.randn(_MAX_OUTPUTS, n_outputs, generator=torch.Generator().manual_seed(_SEED)).to(theta)
    return lambda f: weights @ f.flatten()
