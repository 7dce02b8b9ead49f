"""Tests of uniform ranks: Kolmogorov-Smirnov, coverage of central intervals, and simultaneous bands of the ECDF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from bdl_bench.verify.sbc.ranks import Ranks
from estimators.runtime.rng import member_seeds

__all__ = ["LEVELS", "SIGNIFICANCE", "SbcSummary", "simultaneous_band"]

Floats = NDArray[np.float64]

SIGNIFICANCE = 0.01
"""Level of the Kolmogorov-Smirnov tests."""
LEVELS = (0.5, 0.9)
"""Levels of the central intervals whose coverage is reported."""
_STANDARD_ERRORS = 3
"""Standard errors by which the coverage at 90 % of a method differs that is called too narrow or too wide. Each is the
larger of that over replications and that of an exact posterior whose outputs are covered together."""
_SIMULATIONS = 4000
"""Simulated samples for a simultaneous band: its level of .95 then has a standard error of .003."""


@dataclass(frozen=True)
class SbcSummary:
    """The ranks of one method over all replications of a case, and what they say.

    The outputs at all queries of one replication depend on each other. For the test, each replication therefore counts
    once: `f` has the rank of one output at one query, drawn at random and independently of the data, so that the values
    are independent and, under the posterior, uniform. Coverage is the average over all outputs and queries, with the
    standard error over replications.

    Args:
        case: the name of the case.
        method: the name of the method.
        f: the rank of one output per replication, (R,).
        every_f: the ranks of all outputs, (R, M, C).
        log_likelihood: the rank of the log-likelihood per replication, (R,); empty if the method has no samples.
        ranked_by: "draws" or "normal", see `Ranks`.
        errors: messages of the replications without ranks.
        relative_gradient: the largest ‖∇L‖ / ‖δ θ̂‖ of the trained networks.
    """

    case: str
    method: str
    f: Floats
    every_f: Floats
    log_likelihood: Floats
    ranked_by: str
    errors: tuple[str, ...]
    relative_gradient: float

    @classmethod
    def of(
        cls,
        case: str,
        method: str,
        found: Sequence[Ranks],
        seeds: Sequence[int],
        errors: Sequence[str],
        gradient: float,
    ) -> SbcSummary:
        """Return the summary of the ranks of some replications and of their seeds, which choose the outputs.

        Args:
            case: the name of the case.
            method: the name of the method.
            found: ranks by replication.
            seeds: the seed of each of these replications.
            errors: messages of the other replications.
            gradient: the largest relative gradient.

        Returns:
            The summary.
        """
        chosen = [_chosen(ranks.f, seed) for ranks, seed in zip(found, seeds, strict=True)]
        every = torch.stack([ranks.f for ranks in found]).numpy() if found else np.empty((0, 0, 0))
        log_likelihood = [ranks.log_likelihood for ranks in found if ranks.log_likelihood is not None]
        ranked_by = found[0].ranked_by if found else ""
        return cls(case, method, np.array(chosen), every, np.array(log_likelihood), ranked_by, tuple(errors), gradient)

    @property
    def n(self) -> int:
        """The number R of replications with ranks."""
        return len(self.f)

    @cached_property
    def ks(self) -> tuple[float, float]:
        """Distance and p-value of the Kolmogorov-Smirnov test of uniform ranks of f."""
        return _ks(self.f)

    @cached_property
    def ks_log_likelihood(self) -> tuple[float, float]:
        """Distance and p-value of the Kolmogorov-Smirnov test of uniform ranks of the log-likelihood."""
        return _ks(self.log_likelihood)

    def coverage(self, level: float) -> tuple[float, float]:
        """Return how often central intervals of f cover the truth.

        Args:
            level: of the interval, such as 0.9.

        Returns:
            The coverage over all outputs, queries and replications, and its standard error over replications.
        """
        covered = (np.abs(self.every_f - 0.5) <= level / 2).mean(axis=(1, 2))
        if len(covered) < 2:
            return (float(covered.mean()) if len(covered) else math.nan), math.nan
        return float(covered.mean()), float(covered.std(ddof=1) / math.sqrt(len(covered)))

    @property
    def spread(self) -> float:
        """Median of |Φ⁻¹(rank)| over that of a standard normal: above 1 if intervals are too narrow."""
        scores = np.abs(special.ndtri(np.clip(self.every_f, 1e-300, 1 - 1e-16)))
        return float(np.median(scores) / special.ndtri(0.75)) if scores.size else math.nan

    @property
    def is_uniform(self) -> bool:
        """Whether neither test rejects uniform ranks at the level of .01."""
        tests = [self.ks[1]] + ([self.ks_log_likelihood[1]] if len(self.log_likelihood) else [])
        return self.n > 0 and min(tests) > SIGNIFICANCE

    @property
    def verdict(self) -> str:
        """What the ranks say, in words."""
        if not self.n:
            return "not run"
        coverage, found = self.coverage(0.9)
        error = float(np.maximum(found, _largest_error(0.9, self.n)))  # NaN, hence no verdict, for one replication
        parts = []
        if abs(coverage - 0.9) > _STANDARD_ERRORS * error:
            parts.append("too narrow" if coverage < 0.9 else "too wide")
        elif self.ks[1] <= SIGNIFICANCE:
            parts.append("f not uniform")
        if self.ks_log_likelihood[1] <= SIGNIFICANCE:
            parts.append("log-likelihood not uniform")
        return "; ".join(parts) or "uniform"


def _largest_error(level: float, n: int) -> float:
    """Return the standard error of the coverage of an exact posterior whose outputs are all covered or none.

    It bounds that of outputs that are less correlated. The error that few replications have by chance may be 0.
    """
    return math.sqrt(level * (1 - level) / n)


@lru_cache(maxsize=64)
def simultaneous_band(n: int, level: float = 0.95, n_points: int = 100) -> tuple[Floats, Floats, Floats]:
    """Return the band within which the whole ECDF of n independent uniform numbers is with a probability.

    Pointwise binomial intervals at a level that a simulation adjusts (Säilynoja, Bürkner and Vehtari 2022, "Graphical
    test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple sample comparison",
    algorithm 1).

    Args:
        n: the number of values.
        level: the probability.
        n_points: the number of points of the grid.

    Returns:
        The grid z, and the lower and upper bounds of ECDF(z) − z.
    """
    z = np.arange(1, n_points) / n_points
    uniform = np.random.default_rng(0).random((_SIMULATIONS, n))
    counts = np.stack([(uniform <= point).sum(axis=1) for point in z], axis=1)
    tails = 2 * np.minimum(stats.binom.cdf(counts, n, z), stats.binom.sf(counts - 1, n, z))
    gamma = np.quantile(tails.min(axis=1), 1 - level)
    lower, upper = (stats.binom.ppf(q, n, z) / n - z for q in (gamma / 2, 1 - gamma / 2))
    return z, lower, upper


def _chosen(f: Tensor, seed: int) -> float:
    """Return the rank of one output at one query, drawn by a generator of its own."""
    generator = torch.Generator().manual_seed(member_seeds(seed, 3)[2])
    return float(f.flatten()[torch.randint(f.numel(), (), generator=generator)])


def _ks(ranks: Floats) -> tuple[float, float]:
    if not len(ranks):
        return math.nan, math.nan
    found = stats.kstest(ranks, "uniform")
    return float(found.statistic), float(found.pvalue)
