"""Ranks of the truth under a fitted method: among its draws, or by the normal distribution of its moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdl_bench.verify.sbc.case import Simulation
from estimators import UncertaintyEstimator
from estimators.errors import UnsupportedError
from estimators.estimator.members import MembersEstimator
from estimators.sampling import ReferencePosterior

__all__ = ["N_DRAWS", "Ranks", "rank_among", "ranks_of"]

N_DRAWS = 99
"""Posterior draws that a truth is ranked among, so that ranks have 100 values, as in Talts et al. (2018). A sampler has
thousands of autocorrelated ones: 99 that are evenly spaced are nearly independent."""


@dataclass(frozen=True)
class Ranks:
    """Ranks of one replication in [0, 1], uniform if the method has the posterior.

    Attributes:
        f: of the outputs at the queries, (M, C).
        log_likelihood: of log p(y | f(x)) over the training data; None if the method has no function samples.
        ranked_by: "draws" or "normal": whether `f` has ranks among draws, or the normal distribution function of the
            method's mean and variance.
    """

    f: Tensor
    log_likelihood: float | None
    ranked_by: str


def ranks_of(estimator: UncertaintyEstimator, simulation: Simulation, seed: int) -> Ranks:
    """Return the ranks of the true outputs and of the true log-likelihood under a fitted estimator.

    A method with at least 99 draws is ranked by them. Fewer draws, such as the members of an ensemble, give ranks of
    few values, which hide how far outside of them the truth is: those methods, and those with moments alone, are ranked
    by the normal distribution of their mean and epistemic variance.

    The ranks of outputs do not see whether a method uses the data: the prior has uniform ranks too. The log-likelihood
    depends on parameters and data, and its ranks do (Modrák et al. 2023, "Simulation-based calibration checking for
    Bayesian computation: the choice of test quantities shapes sensitivity").

    Args:
        estimator: fitted to the data of the simulation.
        simulation: the data and the truth.
        seed: of function samples and of random ranks among equal values.

    Returns:
        The ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    prediction = estimator.predict_uncalibrated(simulation.queries)
    if prediction.samples is not None and len(prediction.samples) >= N_DRAWS:
        draws = _evenly_spaced(prediction.samples.flatten(2))
        f = rank_among(draws, simulation.truth, generator)
        ranked_by = "draws"
    else:
        mean, variance = prediction.mean.flatten(1), prediction.epistemic_variance.flatten(1)
        f = torch.special.ndtr((simulation.truth - mean) / variance.clamp_min(0).sqrt().clamp_min(1e-300))
        ranked_by = "normal"
    return Ranks(f, _log_likelihood_rank(estimator, simulation, generator, seed), ranked_by)


def rank_among(draws: Tensor, truth: Tensor, generator: torch.Generator) -> Tensor:
    """Return the normalised ranks of values among draws, randomised within a rank and among ties.

    The rank r of a truth among L exchangeable draws is uniform on 0 ... L, and (r + u)/(L + 1) on [0, 1].

    Args:
        draws: (L, ...).
        truth: (...).
        generator: of u.

    Returns:
        (...), in [0, 1].
    """
    below, equal = ((draws < truth).double().sum(0), (draws == truth).double().sum(0))
    u = torch.rand(truth.shape, generator=generator, dtype=torch.float64)
    return (below + u * (equal + 1)) / (len(draws) + 1)


def _log_likelihood_rank(
    estimator: UncertaintyEstimator, simulation: Simulation, generator: torch.Generator, seed: int
) -> float | None:
    try:
        draws = _function_draws(estimator, simulation, seed)
    except UnsupportedError:
        return None
    likelihood, y = simulation.problem.likelihood, simulation.targets

    def log_likelihood(f: Tensor) -> Tensor:
        return -likelihood.nll(f, y).sum()

    values = torch.stack([log_likelihood(f) for f in draws])
    return float(rank_among(values, log_likelihood(simulation.truth_at_inputs), generator))


def _function_draws(estimator: UncertaintyEstimator, simulation: Simulation, seed: int) -> Tensor:
    """Return draws (L, N, C) of the outputs at the training inputs, each member once."""
    if isinstance(estimator, MembersEstimator):
        return _evenly_spaced(estimator.member_outputs(simulation.inputs))
    if isinstance(estimator, ReferencePosterior):
        # The chains were judged at the queries; a replication left out for its training rows would bias the ranks.
        return _evenly_spaced(estimator.weight_draws_.at(simulation.inputs).f.flatten(0, 1))
    return estimator.sample(simulation.inputs, N_DRAWS, seed=seed)


def _evenly_spaced(draws: Tensor) -> Tensor:
    """Return at most 99 of the draws."""
    if len(draws) <= N_DRAWS:
        return draws
    return draws[torch.linspace(0, len(draws) - 1, N_DRAWS).round().long()]
