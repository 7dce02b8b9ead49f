"""Posterior draws: sample-then-optimise, the default."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from estimators.errors import OptionError, UnsupportedError
from estimators.network import Network
from estimators.noise import precision_noise
from estimators.objective import Objective
from estimators.pytrees import PyTree
from estimators.regvar.exact_block import ExactBlock, find_exact_block
from estimators.regvar.penalty import Tilt
from estimators.regvar.readout import Readout
from estimators.regvar.regularizers.base import Posed, Regularizer, checked_count, probe_generator

__all__ = ["PosteriorDraws"]


class PosteriorDraws(Regularizer):
    """r_k(θ) = ξ_kᵀθ, ξ ~ N(0, A): the response J A⁻¹ξ is a posterior draw of the function (Antorán et al. 2023).

    variance = mean_k response², unbiased and never negative, with relative error √(2/K) at every x. With an exact
    block L (the last layer) ξ_R ← ξ_R − A_RL A_LL⁻¹ξ_L, ξ_L ← 0, and
    variance = last-layer variance + mean_k response².

    Args:
        n_draws: K.
        seed: of the draws.
        exact_block: "auto" (the last layer where it is linear, trainable, untied, within the subset and small enough to
            factor, else none), "last_layer", or None.
    """

    needs_ggn = True

    def __init__(self, n_draws: int = 16, seed: int = 0, exact_block: str | None = "auto") -> None:
        if exact_block not in ("auto", "last_layer", None):
            raise OptionError(
                'exact_block "auto", "last_layer" or None', received=repr(exact_block), remedy='use "auto".'
            )
        self.n_draws, self.seed, self.exact_block = checked_count("n_draws", n_draws), seed, exact_block

    def __repr__(self) -> str:
        return f"PosteriorDraws(n_draws={self.n_draws}, seed={self.seed}, exact_block={self.exact_block!r})"

    def pose(self, objective: Objective, x: PyTree = None) -> Posed:  # noqa: ARG002
        block, reason = find_exact_block(objective, self.exact_block)
        xi, z = precision_noise(objective, self.n_draws, probe_generator(objective, self.seed))
        start = _prior_draw(z, objective.prior.precision)
        if block is not None:
            xi = block.without_block(objective, xi)
            start = torch.where(block.mask, 0.0, start)
        penalty = Tilt.along(xi, objective.theta, start=start)
        return penalty, lambda displacement: DrawReadout(objective.network, displacement, block, reason)


def _prior_draw(z: Tensor, prior_precision: Tensor) -> Tensor:
    """z/√δ, a draw from the prior: already the answer where the data say nothing; 0 where δ = 0."""
    return torch.where(prior_precision > 0, z / prior_precision.clamp_min(torch.finfo(z.dtype).tiny).sqrt(), 0.0)


class DrawReadout(Readout):
    """Mean squared response of K draws, plus the exact block's own variance."""

    def __init__(self, network: Network, displacement: Tensor, block: ExactBlock | None, reason: str) -> None:
        self.network, self.displacement = network, displacement
        self.block, self.exact_block = block, reason

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

    def sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        if n_samples > len(self.displacement):
            raise UnsupportedError(
                f"at most {len(self.displacement)} function samples, one a posterior draw",
                received=str(n_samples),
                remedy=f"PosteriorDraws(n_draws={n_samples}).",
            )
        response = self.network.jvp(x, self.displacement[:n_samples])
        return response if self.block is None else response + self.block.sample(x, n_samples, generator)

    def standard_error(self, x: PyTree) -> Tensor:
        """√(2/K) of the drawn part: the response is Gaussian."""
        return self.drawn_variance(x) * math.sqrt(2 / len(self.displacement))
