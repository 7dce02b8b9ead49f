"""Posterior draws: sample-then-optimise, the default."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from estimators.errors import OptionError
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.objective.prior_noise import precision_noise
from estimators.option_checks import checked_choice, checked_seed
from estimators.regvar.bounds import VarianceBounds
from estimators.regvar.monte_carlo import (
    BoundInterpolation,
    ClippedMonteCarlo,
    InterpolatedBounds,
    MonteCarloVariance,
    restored_draws,
)
from estimators.regvar.perturbation import LinearPerturbation
from estimators.regvar.rao_blackwell import RaoBlackwellBlock, find_rao_blackwell_block
from estimators.regvar.regularizers.base import Posed, Read, Regularizer, checked_count, probe_generator
from estimators.regvar.solvers.base import Solution
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["PosteriorDraws"]

_LARGE = 1000
_PRODUCTS = 9  # with A a draw, everything counted, where bounds are read: docs/math.md, section 5


class PosteriorDraws(Regularizer):
    """r_k(θ) = ξ_kᵀθ, ξ ~ N(0, A): the response J A⁻¹ξ is a posterior draw of the function (Antorán et al. 2023).

    variance = mean_k response², unbiased and never negative, with relative error √(2/K) at every x. With an exact
    block L (the last layer) ξ_R ← ξ_R − A_RL A_LL⁻¹ξ_L, ξ_L ← 0, and
    variance = last-layer variance + mean_k response².

    Args:
        n_draws: K.
        seed: of the draws.
        rao_blackwell: "auto" (the last layer where it is linear, trainable, untied, within the subset and small enough
            to factor, else none), "last_layer", or None.
        readout: "draws" (the mean square: unbiased), "bounds" (a place between two bounds of the variance at each x,
            which the solver's Krylov space gives; the draws say which place: sharper by far, and needs LinearResponse
            and a prior on every parameter), or "auto": bounds where the solver has them, and the draws within them
            where they are wide, unless rao_blackwell=None asks for plain Monte Carlo or there are fewer than 1,000
            parameters, for which LinearizedLaplace is exact.
    """

    needs_ggn = True

    def __init__(
        self, n_draws: int = 16, seed: int = 0, rao_blackwell: str | None = "auto", readout: str = "auto"
    ) -> None:
        self.n_draws, self.seed = checked_count("n_draws", n_draws), checked_seed(seed)
        self.rao_blackwell = checked_choice("rao_blackwell", rao_blackwell, ("auto", "last_layer", None))
        readout = checked_choice("readout", readout, ("auto", "draws", "bounds"))
        self.readout = readout

    def __repr__(self) -> str:
        block = f"rao_blackwell={self.rao_blackwell!r}"
        return f"PosteriorDraws(n_draws={self.n_draws}, seed={self.seed}, {block}, readout={self.readout!r})"

    def pose(self, objective: Objective, x: PyTree = None) -> Posed:  # noqa: ARG002
        block, reason = find_rao_blackwell_block(objective, self.rao_blackwell)
        xi, z = precision_noise(objective, self.n_draws, probe_generator(objective, self.seed))
        start = _prior_draw(z, objective.prior.precision)
        if block is not None:
            xi = block.without_block(objective, xi)
            start.masked_fill_(block.mask, 0.0)
        bounded = self._wants_bounds(objective)
        budget = _PRODUCTS - 1 - (block is not None) if bounded else None  # one for ξ, one for the block
        perturbation = LinearPerturbation.along(xi, objective.theta, start=start, budget=budget)
        return perturbation, self._read(objective, block, reason, bounded=bounded)

    def restored(self, network: Network, tensors: dict[str, Tensor], learned: dict[str, Any]) -> VarianceEstimate:
        return restored_draws(network, tensors, learned)

    def _wants_bounds(self, objective: Objective) -> bool:
        if self.readout != "auto":
            return self.readout == "bounds"
        large = objective.theta.numel() >= _LARGE
        return large and self.rao_blackwell is not None and bool((objective.prior.precision > 0).all())

    def _read(self, objective: Objective, block: RaoBlackwellBlock | None, reason: str, *, bounded: bool) -> Read:
        def read(solution: Solution) -> MonteCarloVariance:
            draws = MonteCarloVariance(objective.network, solution.displacement, block, reason)
            if bounded and solution.space is not None:
                bounds = VarianceBounds.of(objective.network, solution.space, block)
                level = BoundInterpolation.of(draws, bounds, objective)
                kind = ClippedMonteCarlo if level.wide and self.readout == "auto" else InterpolatedBounds
                return kind(draws, bounds, level)
            if self.readout == "bounds":
                raise OptionError(
                    'a solver with a Krylov space and a prior on every parameter for readout="bounds"',
                    received=solution.report.solver,
                    remedy='solver=LinearResponse(), or readout="draws".',
                )
            return draws

        return read


def _prior_draw(z: Tensor, prior_precision: Tensor) -> Tensor:
    """z/√δ, in z's place: a draw from the prior, already the answer where the data say nothing; 0 where δ = 0."""
    return z.mul_(torch.where(prior_precision > 0, prior_precision.rsqrt(), 0.0))
