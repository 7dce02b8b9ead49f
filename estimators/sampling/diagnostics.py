"""Whether chains have reached the posterior, judged at the outputs of the network and not at its weights.

The weights of a network have symmetries: chains in different but equivalent modes disagree about every weight and agree
about the function. R-hat and effective sample sizes are therefore those of each output at given rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from estimators.likelihoods import Likelihood
from estimators.likelihoods.prediction import Prediction
from estimators.option_checks import checked_number
from estimators.sampling.convergence import bulk_ess, split_r_hat_and_bulk_ess
from estimators.sampling.function_draws import FunctionDraws

__all__ = ["ConvergenceCriteria", "NoiseFloor", "RowDiagnostics", "SamplerDiagnostics", "diagnose_rows", "joined"]

_MARGIN = 0.6
"""The share of what `ConvergenceCriteria` allow at which a run stops: the worst R-hat less 1 of 2,000 outputs is some
1.5 times that of 100."""
_QUERY_MARGIN = 0.9
"""The same for the total variation at a part of the rows of a query, which is a mean over these rows."""
_EVEN, _ODD = slice(0, None, 2), slice(1, None, 2)


@dataclass(frozen=True)
class ConvergenceCriteria:
    """What the chains must reach before their draws count as the posterior.

    Args:
        max_r_hat: of every output. An R-hat of 1.05 leaves a total variation of .03 (digits, shifted rows).
        min_bulk_ess: least bulk effective sample size of every output.
        min_squares_ess: least bulk effective sample size of its squared distance from the mean, for the variance.
        max_total_variation: largest `NoiseFloor.total_variation` at the check rows of a fit.
        max_query_total_variation: the same at other queries, which may be unlike the training rows.
        min_acceptance: least mean acceptance rate after the warm-up.
        max_acceptance: largest mean acceptance rate.
        max_divergences: divergent trajectories after the warm-up.

    Example:
        >>> from estimators.sampling import ConvergenceCriteria
        >>> ConvergenceCriteria(max_r_hat=1.05, min_bulk_ess=200).max_r_hat
        1.05

    Raises:
        OptionError: for a number out of range.
    """

    max_r_hat: float = 1.01
    min_bulk_ess: float = 1000
    min_squares_ess: float = 400
    max_total_variation: float = 0.005
    max_query_total_variation: float = 0.015
    min_acceptance: float = 0.65
    max_acceptance: float = 0.95
    max_divergences: float = 0

    def with_margin(self) -> ConvergenceCriteria:
        """Return stricter criteria, at which sampling stops, so that queries unlike the check rows meet these too."""
        return replace(
            self,
            max_r_hat=1 + _MARGIN * (self.max_r_hat - 1),
            min_bulk_ess=self.min_bulk_ess / _MARGIN,
            min_squares_ess=self.min_squares_ess / _MARGIN,
            max_total_variation=_MARGIN * self.max_total_variation,
            max_query_total_variation=_QUERY_MARGIN * self.max_query_total_variation,
        )

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            checked_number(name, value, at_least=1 if name == "max_r_hat" else 0)


@dataclass(frozen=True)
class NoiseFloor:
    """Half of the distance between the draws of even and of odd chains: the error bar of distances to the reference.

    A distance between a method and the reference below the noise floor cannot be told from none. Even and odd chains
    have different kinds of starts with starts="both".

    Attributes:
        variance: root mean square over rows and outputs of the relative difference of the variances, halved.
        total_variation: mean over rows of the total variation between the predictive distributions, halved. Classes: ½
            Σ_c |p_c − q_c|; regression: that of Gaussians with the predictive means and variances.
        w2: mean over rows and outputs of the 2-Wasserstein distance between the marginals of f, halved, in units of f.
    """

    variance: float
    total_variation: float
    w2: float


@dataclass(frozen=True)
class RowDiagnostics:
    """Diagnostics of the outputs at some rows.

    Attributes:
        r_hat: the largest rank-normalised split R-hat.
        bulk_ess: the smallest bulk effective sample size.
        squares_ess: the smallest one of squared distances from the mean.
        noise_floor: even chains compared with odd ones.
        n_rows: the number of rows.
    """

    r_hat: float
    bulk_ess: float
    squares_ess: float
    noise_floor: NoiseFloor
    n_rows: int


@dataclass(frozen=True)
class SamplerDiagnostics:
    """Diagnostics of the chains, and of their outputs at some rows.

    Attributes:
        rows: of the outputs.
        divergences: trajectories after the warm-up whose Hamiltonian changed by more than 1000.
        acceptance: mean acceptance rate after the warm-up.
        e_bfmi: the smallest energy Bayesian fraction of missing information of a chain.
        n_gradients: gradients over all training rows, summed over chains, so far.
        n_draws: draws that are kept, over all chains.
    """

    rows: RowDiagnostics
    divergences: int
    acceptance: float
    e_bfmi: float
    n_gradients: int
    n_draws: int

    def failures(self, criteria: ConvergenceCriteria, *, query: bool = False) -> list[str]:
        """Return what is not reached, in words; empty if the draws are a reference.

        Args:
            criteria: the criteria.
            query: whether the rows are a query other than the check rows of the fit.

        Returns:
            One phrase for each criterion that is not met.
        """
        rows, largest = self.rows, criteria.max_total_variation
        largest = criteria.max_query_total_variation if query else largest
        found = {
            f"R-hat {rows.r_hat:.4f} > {criteria.max_r_hat:g}": rows.r_hat <= criteria.max_r_hat,
            f"bulk ESS {rows.bulk_ess:.0f} < {criteria.min_bulk_ess:g}": rows.bulk_ess >= criteria.min_bulk_ess,
            f"bulk ESS of squares {rows.squares_ess:.0f} < {criteria.min_squares_ess:g}": rows.squares_ess
            >= criteria.min_squares_ess,
            f"half-split total variation {rows.noise_floor.total_variation:.4f} > {largest:g}": (
                rows.noise_floor.total_variation <= largest
            ),
            f"{self.divergences} divergences > {criteria.max_divergences:g}": (
                self.divergences <= criteria.max_divergences
            ),
            f"acceptance {self.acceptance:.2f} outside [{criteria.min_acceptance:g}, {criteria.max_acceptance:g}]": (
                criteria.min_acceptance <= self.acceptance <= criteria.max_acceptance
            ),
        }
        return [text for text, holds in found.items() if not holds]  # a comparison with NaN does not hold


def diagnose_rows(draws: FunctionDraws, likelihood: Likelihood, shape: torch.Size) -> RowDiagnostics:
    """Return the diagnostics of the outputs at some rows.

    Args:
        draws: of the outputs f (K, S, M, C).
        likelihood: the likelihood, for the predictive distribution.
        shape: the shape of the outputs of one row.

    Returns:
        The worst convergence over all outputs, and the distances between even and odd chains.
    """
    f = draws.f.double()
    outputs = f.flatten(2)
    # An output that never varies, as behind a ReLU that is off, has nothing to converge.
    outputs = outputs[..., (outputs != outputs[:1, :1]).flatten(0, 1).any(0)]
    if not outputs.shape[-1]:
        worst = (1.0, math.inf, math.inf)
    else:
        squares = (outputs - outputs.mean((0, 1))).square()
        (r_hat, bulk), of_squares = split_r_hat_and_bulk_ess(outputs), bulk_ess(squares)
        worst = (float(r_hat.max()), float(bulk.min()), float(of_squares.min()))
    return RowDiagnostics(*worst, _noise_floor(draws, likelihood, shape), f.shape[2])


def joined(parts: Iterable[RowDiagnostics]) -> RowDiagnostics:
    """Return the diagnostics of all rows from those of parts: the worst convergence, and the means of distances."""
    parts = list(parts)
    rows = [part.n_rows for part in parts]

    def mean(name: str, power: int = 1) -> float:
        values = [getattr(part.noise_floor, name) ** power for part in parts]
        return float((sum(n * value for n, value in zip(rows, values, strict=True)) / sum(rows)) ** (1 / power))

    floor = NoiseFloor(mean("variance", 2), mean("total_variation"), mean("w2"))
    convergence = [[part.r_hat, part.bulk_ess, part.squares_ess] for part in parts]
    r_hat, bulk, squares = torch.tensor(convergence, dtype=torch.float64).unbind(1)  # a NaN is the worst
    return RowDiagnostics(float(r_hat.max()), float(bulk.min()), float(squares.min()), floor, sum(rows))


def _noise_floor(draws: FunctionDraws, likelihood: Likelihood, shape: torch.Size) -> NoiseFloor:
    halves = [_half(draws, chains, likelihood, shape) for chains in (_EVEN, _ODD)]
    (_, even), (_, odd) = (half[0] for half in halves)
    scale = (0.5 * (even + odd)).clamp_min(torch.finfo(even.dtype).tiny)
    variance = float(((even - odd) / scale).square().mean().sqrt())
    marginals = [draws.f[chains].flatten(0, 1).flatten(1).T.contiguous().sort(1).values for chains in (_EVEN, _ODD)]
    w2 = float((marginals[0] - marginals[1]).square().mean(1).sqrt().mean())
    return NoiseFloor(variance / 2, _total_variation(*(half[1] for half in halves)) / 2, w2 / 2)


def _half(
    draws: FunctionDraws, chains: slice, likelihood: Likelihood, shape: torch.Size
) -> tuple[tuple[Tensor, Tensor], Prediction]:
    """Return moments and predictive distribution by some chains."""
    moments = draws.moments(chains)
    mean, variance = (part.reshape(-1, *shape) for part in moments)
    samples = None if likelihood.kind == "regression" else draws.f[chains].flatten(0, 1).reshape(-1, len(mean), *shape)
    return moments, likelihood.predict(mean, variance, samples)


def _total_variation(first: Prediction, other: Prediction) -> float:
    """Return the mean over rows of the total variation between two predictive distributions."""
    if first.probs is not None and other.probs is not None:
        gaps = (first.probs.double() - other.probs.double()).abs()
        return float((0.5 * gaps.sum(first.class_dim) if first.kind == "classification" else gaps).mean())
    assert first.total_variance is not None
    assert other.total_variance is not None
    return float(gaussian_total_variation(first.mean, first.total_variance, other.mean, other.total_variance).mean())


def gaussian_total_variation(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Return the total variation between Gaussians, from the points at which their densities are equal.

    Args:
        mean: of the first ones, of any shape.
        variance: of the first ones.
        other_mean: of the others.
        other_variance: of the others.

    Returns:
        ½ ∫ |p − q|, of the same shape.
    """
    m, v, n, w = (part.double() for part in (mean, variance, other_mean, other_variance))
    # log p − log q = a y² + b y + c around the middle of the means, with a = (1/w − 1/v)/2
    middle = (m + n) / 2
    m, n = m - middle, n - middle
    a, b = (1 / w - 1 / v) / 2, m / v - n / w
    c = (n.square() / w - m.square() / v + (w / v).log()) / 2
    root = (b.square() - 4 * a * c).clamp_min(0).sqrt()
    q = -0.5 * (b + torch.where(b >= 0, root, -root))  # without cancellation
    ends = torch.stack([q / a, c / q]).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    low, high = ends.min(0).values, ends.max(0).values
    inside = [_cdf(high, mu, s) - _cdf(low, mu, s) for mu, s in ((m, v), (n, w))]
    return (inside[0] - inside[1]).abs()


def _cdf(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    below: Tensor = torch.special.ndtr((y - mean) / variance.sqrt())
    return below
