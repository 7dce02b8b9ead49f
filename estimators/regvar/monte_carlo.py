"""Reading posterior draws: their mean square, or a place between the bounds of the space they were solved in."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.errors import UnsupportedError
from estimators.models.functionals import ComposedNetwork, Functional
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree, select_rows
from estimators.objective.objective import Objective
from estimators.persistence.state import Learned
from estimators.regvar.bounds import VarianceBounds
from estimators.regvar.rao_blackwell import ComposedBlock, RaoBlackwellBlock
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["BoundInterpolation", "ClippedMonteCarlo", "InterpolatedBounds", "MonteCarloVariance", "restored_draws"]

_FEWEST, _MOST, _SHARE = 16, 256, 0.1  # training rows for the level: a tenth of them, within limits
_OUTPUTS = 32  # for the level: a backward each
_SEED = 0  # of the rows for the level
_WIDE = 12.0  # upper over lower, where a place between them is no guide: docs/math.md, section 5


class MonteCarloVariance(VarianceEstimate):
    """Mean squared response of K draws, plus the exact block's own variance."""

    def __init__(self, network: Network, displacement: Tensor, block: RaoBlackwellBlock | None, reason: str) -> None:
        self.network, self.displacement = network, displacement
        self.block, self.rao_blackwell = block, reason

    def drawn_variance(self, x: PyTree) -> Tensor:
        """The part that the draws estimate, (M, C)."""
        return self.network.jvp(x, self.displacement).square().mean(0)

    def variance(self, x: PyTree) -> Tensor:
        drawn = self.drawn_variance(x)
        return drawn if self.block is None else self.block.variance(x) + drawn

    def covariance(self, x: PyTree) -> Tensor:
        response = self.network.jvp(x, self.displacement)
        drawn = torch.einsum("kmc,kmd->mcd", response, response) / len(response)
        return drawn if self.block is None else self.block.covariance(x) + drawn

    def through(self, of: Functional) -> MonteCarloVariance:
        block = None if self.block is None else ComposedBlock.of(self.block, of)
        return MonteCarloVariance(ComposedNetwork(self.network, of), self.displacement, block, self.rao_blackwell)

    def sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        if n_samples > len(self.displacement):
            raise UnsupportedError(
                f"at most {len(self.displacement)} function samples, one a posterior draw",
                received=str(n_samples),
                remedy=f"PosteriorDraws(n_draws={n_samples}).",
            )
        device = self.displacement.device
        which = torch.randperm(len(self.displacement), generator=generator, device=device)[:n_samples]
        response = self.network.jvp(x, self.displacement[which])
        if self.block is None:
            return response
        return response + self.block.sample(x, n_samples, generator).to(response.dtype)

    def state(self) -> Learned:
        block, head = ({}, None) if self.block is None else self.block.state()
        return {"displacement": self.displacement, **block}, {"rao_blackwell": self.rao_blackwell, "head": head}

    def standard_error(self, x: PyTree) -> Tensor:
        """√(2/K) of the drawn part."""
        return self.drawn_variance(x) * math.sqrt(2 / len(self.displacement))


@dataclass(frozen=True)
class BoundInterpolation:
    """Where between the bounds the draws' variance lies, on average over some training rows; and its standard error.

    width: how many times the lower bound the upper one is, the median over those rows and their outputs.
    """

    place: float
    error: float
    width: float = 1.0

    @property
    def wide(self) -> bool:
        """Whether the bounds are too far apart for a place between them."""
        return self.width > _WIDE

    @classmethod
    def of(cls, draws: MonteCarloVariance, bounds: VarianceBounds, objective: Objective) -> BoundInterpolation:
        """From a tenth of the training rows; of many outputs (tokens, pixels) from random combinations."""
        parts = [_Part.of(draws, bounds, x) for x in _some_rows(objective)]
        lower, upper = (torch.cat([getattr(part, name) for part in parts]) for name in ("lower", "upper"))
        width = (upper - lower).sum()
        if not float(width) > 1e-9 * float(upper.sum()):
            return cls(0.5, 0.5)  # the bounds have met
        places = sum(part.above for part in parts) / width  # one a draw
        error = float(places.std()) / math.sqrt(len(places)) if len(places) > 1 else 0.5
        apart = float((upper / lower.clamp_min(torch.finfo(lower.dtype).tiny)).median())
        return cls(float(places.mean().clamp(0, 1)), min(0.5, error), apart)


@dataclass(frozen=True)
class _Part:
    """At some rows of one batch: both bounds, flat, and by how much each draw is above the lower one in sum, (K,)."""

    lower: Tensor
    upper: Tensor
    above: Tensor

    @classmethod
    def of(cls, draws: MonteCarloVariance, bounds: VarianceBounds, x: PyTree) -> _Part:
        combine = _combinations(draws.network, x)
        if combine is not None:
            draws = draws.through(combine)
            bounds = replace(bounds, network=draws.network, block=draws.block)
        lower, upper = bounds.variance(x)
        response = draws.network.jvp(x, draws.displacement).square()  # (K, M, C)
        known = torch.zeros_like(lower) if draws.block is None else draws.block.variance(x)
        return cls(lower.flatten(), upper.flatten(), response.sum((1, 2)) + (known - lower).sum())


class InterpolatedBounds(MonteCarloVariance):
    """Shape from the Krylov space, level from the draws: lower + place·(upper − lower), place from the training rows.

    Both bounds hold at every x, and the variance lies between them. Samples are the draws.
    """

    clamped: ClassVar[bool] = False

    def __init__(self, draws: MonteCarloVariance, bounds: VarianceBounds, level: BoundInterpolation) -> None:
        super().__init__(draws.network, draws.displacement, draws.block, draws.rao_blackwell)
        self.bounds, self.level = bounds, level

    def state(self) -> Learned:
        tensors, learned = super().state()
        which = {"level": asdict(self.level), "clamped": self.clamped}
        return {**tensors, **self.bounds.space.state()}, {**learned, **which}

    def through(self, of: Functional) -> InterpolatedBounds:
        draws = super().through(of)
        return type(self)(draws, replace(self.bounds, network=draws.network, block=draws.block), self.level)

    def variance(self, x: PyTree) -> Tensor:
        lower, upper = self.bounds.variance(x)
        return torch.lerp(lower, upper, self.level.place)

    def covariance(self, x: PyTree) -> Tensor:
        lower, upper = self.bounds.covariance(x)
        return torch.lerp(lower, upper, self.level.place)

    def standard_error(self, x: PyTree) -> Tensor:
        """Of the level alone; how far the shape may be off is bounded by `bounds`."""
        lower, upper = self.bounds.variance(x)
        return (upper - lower) * self.level.error


class ClippedMonteCarlo(InterpolatedBounds):
    """The mean square of the draws, brought to the nearer bound where it lies outside of both.

    For bounds so wide that a place between them says little about the shape: draws then err by √(2/K), and by what
    they are from their end, but alike at every x.
    """

    clamped = True

    def variance(self, x: PyTree) -> Tensor:
        lower, upper = self.bounds.variance(x)
        return MonteCarloVariance.variance(self, x).clamp(lower, upper)

    def covariance(self, x: PyTree) -> Tensor:
        """The correlations of the draws, and `variance` on the diagonal: Σ ← Σ √(v vᵀ / d dᵀ)."""
        drawn, (lower, upper) = MonteCarloVariance.covariance(self, x), self.bounds.variance(x)
        before = drawn.diagonal(dim1=1, dim2=2)
        scale = (before.clamp(lower, upper) / before.clamp_min(torch.finfo(drawn.dtype).tiny)).sqrt()
        return drawn * scale[:, :, None] * scale[:, None, :]

    def standard_error(self, x: PyTree) -> Tensor:
        return MonteCarloVariance.standard_error(self, x)


def restored_draws(network: Network, tensors: dict[str, Tensor], learned: dict[str, Any]) -> MonteCarloVariance:
    """From `state()` of either readout."""
    block = None if learned["head"] is None else RaoBlackwellBlock.restored(network, tensors["block"], learned["head"])
    draws = MonteCarloVariance(network, tensors["displacement"], block, learned["rao_blackwell"])
    if "level" not in learned:
        return draws
    space = KrylovSpace.restored(tensors)
    kind = ClippedMonteCarlo if learned.get("clamped") else InterpolatedBounds
    return kind(draws, VarianceBounds.of(network, space, block), BoundInterpolation(**learned["level"]))


def _some_rows(objective: Objective) -> list[PyTree]:
    """Rows drawn at random from all batches, those of a batch together: a loader may be sorted, for instance by class.

    Batches are not joined, since their rows may share a value or have a shape of their own.
    """
    n_data = objective.batches.n_data
    wanted = min(_MOST, max(_FEWEST, int(_SHARE * n_data)))
    order = torch.randperm(n_data, generator=torch.Generator().manual_seed(_SEED))
    chosen, start, taken = order[:wanted].sort().values, 0, list[PyTree]()
    for batch in objective.batches:
        inside = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
        if len(inside):
            taken.append(select_rows(batch.x, inside.to(batch.y.device)))
        start += len(batch)
    return taken


def _combinations(network: Network, x: PyTree) -> Functional | None:
    """Outputs of a row -> random sums of them, whose variances add up to theirs on average; None where they are few."""
    n_outputs, theta = network.outputs(select_rows(x, slice(0, 1))).shape[-1], network.theta
    if n_outputs <= _OUTPUTS:
        return None
    weights = torch.randn(_OUTPUTS, n_outputs, generator=torch.Generator().manual_seed(0)).to(theta)
    return lambda f: weights @ f.flatten()
