"""PosteriorDraws: sample-then-optimise, the default regularizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from estimators.errors import OptionError
from estimators.models.network import Network
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.objective.prior_noise import precision_noise
from estimators.option_checks import checked_choice, checked_integer, checked_seed
from estimators.regvar.bounds import BoundsOf, VarianceBounds
from estimators.regvar.exact_draws import ExactDraws
from estimators.regvar.measured_bounds import MeasuredBounds
from estimators.regvar.monte_carlo import (
    BoundInterpolation,
    ClippedMonteCarlo,
    InterpolatedBounds,
    MonteCarloVariance,
)
from estimators.regvar.perturbation import LinearPerturbation
from estimators.regvar.rao_blackwell import RaoBlackwellBlock, find_rao_blackwell_block
from estimators.regvar.regularizers.base import (
    MakeEstimate,
    RegularizedProblem,
    Regularizer,
    probe_generator,
)
from estimators.regvar.restored_draws import restored_draws
from estimators.regvar.solvers.base import Solution
from estimators.regvar.variance_estimate import VarianceEstimate

__all__ = ["PosteriorDraws"]

_SMALL_NETWORK = 1000  # parameters; smaller networks have the exact variance by LinearizedLaplace at little cost
_MAX_PRODUCTS = 9  # with A per draw, for the interpolation between bounds: measured in docs/math.md, section 5


class PosteriorDraws(Regularizer):
    """Random linear functions r_k(θ) = ξ_kᵀθ with ξ_k ~ N(0, A), whose responses are posterior samples of f.

    The response J A⁻¹ξ has covariance J A⁻¹Jᵀ, so that the mean over k of response² is an unbiased, non-negative
    estimate of the variance with relative error √(2/K) at every x. One solve per draw serves all queries.

    With Rao-Blackwellisation over the last layer L, the draws estimate only the part of the variance that comes from
    the other parameters R: variance = last-layer variance + mean of response², with ξ_R ← ξ_R − A_RL A_LL⁻¹ξ_L and
    ξ_L ← 0. This is unbiased too, and less noisy. Needs curvature "ggn".

    Source: sample-then-optimise, Antorán et al. 2023; read as a regularizer of McInerney & Kallus, AISTATS 2025.

    Args:
        n_draws: K, the number of draws.
        seed: seed of the draws.
        rao_blackwell: "auto" (over the last layer, if it is linear, trainable, not tied, within the subset and small
            enough to factor; else none), "last_layer" (raises if that is impossible), or None.
        variance_estimate: "monte_carlo" (the mean square of the responses: unbiased), "bounds" (an interpolation
            between two bounds of the variance, which the solver's Krylov space gives at each x; the draws give the
            interpolation weight; more accurate, but needs LinearResponse and a prior on every parameter), or "auto".
            "auto" interpolates if the solver has bounds. If the bounds are loose, it clips the Monte Carlo estimate to
            them. It is "monte_carlo" with rao_blackwell=None, and below 1,000 parameters, for which LinearizedLaplace
            is exact.

    Raises:
        OptionError: if an argument has another type or value.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from estimators import LinearResponse, PosteriorDraws, RegVar
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = DataLoader(TensorDataset(x, x.sin()), batch_size=10)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> regvar = RegVar(model, "regression", regularizer=PosteriorDraws(32), solver=LinearResponse()).fit(loader)
        >>> regvar.variance(x[:3]).shape
        torch.Size([3, 1])
    """

    needs_ggn = True

    def __init__(
        self, n_draws: int = 16, seed: int = 0, rao_blackwell: str | None = "auto", variance_estimate: str = "auto"
    ) -> None:
        self.n_draws, self.seed = checked_integer("n_draws", n_draws, at_least=1), checked_seed(seed)
        self.rao_blackwell = checked_choice("rao_blackwell", rao_blackwell, ("auto", "last_layer", None))
        self.variance_estimate = checked_choice(
            "variance_estimate", variance_estimate, ("auto", "monte_carlo", "bounds")
        )

    def __repr__(self) -> str:
        return (
            f"PosteriorDraws(n_draws={self.n_draws}, seed={self.seed}, rao_blackwell={self.rao_blackwell!r}, "
            f"variance_estimate={self.variance_estimate!r})"
        )

    def build_problem(self, objective: Objective, x: PyTree = None) -> RegularizedProblem:  # noqa: ARG002
        block, reason = find_rao_blackwell_block(objective, self.rao_blackwell)
        xi, z = precision_noise(objective, self.n_draws, probe_generator(objective, self.seed))
        untouched = _untouched(xi, z, objective.prior.precision)
        guess = _prior_draw(z, objective.prior.precision)
        if block is not None:
            xi = block.rao_blackwellise(objective, xi)
            guess.masked_fill_(block.mask, 0.0)
        interpolates = self._wants_bounds(objective)
        # One product was spent on ξ, and one on Rao-Blackwellisation.
        max_products = _MAX_PRODUCTS - 1 - (block is not None) if interpolates else None
        bounds_of = partial(VarianceBounds.of, objective.network, block=block, untouched=untouched)
        perturbation = LinearPerturbation.along(
            xi,
            objective.theta,
            initial_guess=guess,
            max_products=max_products,
            bounds_of=bounds_of if self.has_bounds(objective) else None,
        )
        return perturbation, self._make_estimate(objective, block, bounds_of, reason, interpolates=interpolates)

    def restore_estimate(
        self, network: Network, tensors: dict[str, Tensor], learned: dict[str, Any]
    ) -> VarianceEstimate:
        return restored_draws(network, tensors, learned)

    def has_bounds(self, objective: Objective) -> bool:
        """Return whether the variance may be estimated from bounds, which need a prior on every parameter.

        Args:
            objective: the centred objective.

        Returns:
            False with variance_estimate="monte_carlo", or if some prior precision is 0.
        """
        return self.variance_estimate != "monte_carlo" and bool((objective.prior.precision > 0).all())

    def _wants_bounds(self, objective: Objective) -> bool:
        if self.variance_estimate != "auto":
            return self.variance_estimate == "bounds"
        large = objective.theta.numel() >= _SMALL_NETWORK
        return large and self.rao_blackwell is not None and bool((objective.prior.precision > 0).all())

    def _make_estimate(
        self,
        objective: Objective,
        block: RaoBlackwellBlock | None,
        bounds_of: BoundsOf,
        reason: str,
        *,
        interpolates: bool,
    ) -> MakeEstimate:
        def make(solution: Solution) -> MonteCarloVariance:
            draws = MonteCarloVariance(objective.network, solution.displacement, block, reason)
            if solution.precision is not None:
                return ExactDraws(draws, solution.precision, solution.round_off)
            if solution.accuracy is not None and solution.space is not None:
                bounds = bounds_of(solution.space, solution.accuracy.leading(solution.space.rank))
                return MeasuredBounds(draws, bounds, solution.accuracy)
            if interpolates and solution.space is not None:
                bounds = bounds_of(solution.space, [])
                interpolation = BoundInterpolation.of(draws, bounds, objective)
                clips = interpolation.bounds_are_loose and self.variance_estimate == "auto"
                kind = ClippedMonteCarlo if clips else InterpolatedBounds
                return kind(draws, bounds, interpolation)
            if self.variance_estimate == "bounds":
                raise OptionError(
                    'a solver with a Krylov space and a prior on every parameter for variance_estimate="bounds"',
                    received=solution.report.solver,
                    remedy='solver=LinearResponse(), or variance_estimate="monte_carlo".',
                )
            return draws

        return make


def _untouched(xi: Tensor, z: Tensor, prior_precision: Tensor) -> Tensor:
    """Return which weights no training row has added anything to ξ for, bool (P,): their derivatives are 0 there."""
    untouched, scale = torch.ones_like(prior_precision, dtype=torch.bool), prior_precision.sqrt()
    for drawn, noise in zip(xi, z, strict=True):
        untouched &= drawn == scale * noise
    return untouched


def _prior_draw(z: Tensor, prior_precision: Tensor) -> Tensor:
    """Return z/√δ, a draw from the prior, in the memory of z; 0 if δ = 0.

    In directions that the data do not constrain, it is already the solution A⁻¹ξ.
    """
    return z.mul_(torch.where(prior_precision > 0, prior_precision.rsqrt(), 0.0))
