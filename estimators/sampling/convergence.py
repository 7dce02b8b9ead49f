"""Convergence of Markov chains, for many scalar quantities at a time: R-hat, effective sample size and E-BFMI.

Source: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), "Rank-normalization, folding, and localization: an
improved R̂ for assessing convergence of MCMC"; Betancourt (2016), "Diagnosing suboptimal cotangent disintegrations in
Hamiltonian Monte Carlo", for E-BFMI. The values equal those of arviz-stats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["bulk_ess", "e_bfmi", "split_r_hat", "split_r_hat_and_bulk_ess"]

_RANK_OFFSET, _RANK_DENOMINATOR = 3 / 8, 1 / 4
"""Blom's normal scores, (rank − 3/8) / (S + 1/4)."""
_LEAST_DRAWS = 4
"""The least number of draws per chain: two for each half."""


def split_r_hat(draws: Tensor) -> Tensor:
    """Return the rank-normalised split R-hat: the larger one of the draws and of their distances from the median.

    Args:
        draws: (K, S, Q), S draws of Q quantities in each of K chains.

    Returns:
        (Q,), near 1 if the chains agree in location and spread. NaN with fewer than 4 draws, or if all are equal.
    """
    if draws.shape[1] < _LEAST_DRAWS:
        return draws.new_full(draws.shape[2:], math.nan)
    halves = _split(draws)
    return _split_r_hat(halves, _normal_scores(halves))


def bulk_ess(draws: Tensor) -> Tensor:
    """Return the effective sample size of the rank-normalised draws of split chains.

    Args:
        draws: (K, S, Q), S draws of Q quantities in each of K chains.

    Returns:
        (Q,), the number of independent draws with the same error of a mean. NaN as for `split_r_hat`.
    """
    if draws.shape[1] < _LEAST_DRAWS:
        return draws.new_full(draws.shape[2:], math.nan)
    return _ess(_normal_scores(_split(draws)))


def split_r_hat_and_bulk_ess(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return `split_r_hat` and `bulk_ess`, which rank the same values, in less time than one after the other.

    Args:
        draws: (K, S, Q), S draws of Q quantities in each of K chains.

    Returns:
        Both, (Q,).
    """
    if draws.shape[1] < _LEAST_DRAWS:
        return split_r_hat(draws), bulk_ess(draws)
    halves = _split(draws)
    scores = _normal_scores(halves)
    return _split_r_hat(halves, scores), _ess(scores)


def e_bfmi(energies: Tensor) -> Tensor:
    """Return the energy Bayesian fraction of missing information of each chain.

    Args:
        energies: the Hamiltonian at the start of each trajectory, (K, T).

    Returns:
        (K,). Below about 0.3 the momenta explore the energies too slowly.
    """
    return energies.diff(dim=1).square().mean(1) / energies.var(1)


def _split_r_hat(halves: Tensor, scores: Tensor) -> Tensor:
    """Return the split R-hat of halves of chains (2K, n, Q) with their normal scores."""
    folded = (halves - _median(halves.flatten(0, 1))).abs()
    return torch.maximum(_r_hat(scores), _r_hat(_normal_scores(folded)))


def _split(draws: Tensor) -> Tensor:
    """Return the halves of each chain as chains, (2K, S // 2, Q), without the middle one of an odd number of draws."""
    half = draws.shape[1] // 2
    return torch.stack([draws[:, :half], draws[:, -half:]], dim=1).flatten(0, 1)


def _median(values: Tensor) -> Tensor:
    """Return the median of each column, the mean of the middle two if their number is even."""
    columns, n = values.T.contiguous(), len(values)
    lower, upper = (columns.kthvalue(k, dim=1).values for k in ((n + 1) // 2, n // 2 + 1))
    return (lower + upper) / 2


def _normal_scores(chains: Tensor) -> Tensor:
    """Return the normal scores of the ranks over all chains, in float64; equal values have their average rank."""
    pooled = chains.flatten(0, 1).double().T.contiguous()  # (Q, n)
    ascending, order = pooled.sort(dim=1)
    ranks = torch.empty_like(pooled).scatter_(1, order, _ranks(ascending))
    scores = torch.special.ndtri((ranks - _RANK_OFFSET) / (pooled.shape[1] + _RANK_DENOMINATOR))
    scores = torch.where((ascending[:, :1] == ascending[:, -1:]), math.nan, scores)  # no spread: nothing to compare
    return scores.T.reshape(chains.shape)


def _ranks(ascending: Tensor) -> Tensor:
    """Return the ranks 1 to n of values in ascending rows (Q, n), the average rank of their run for equal ones."""
    n = ascending.shape[1]
    position = torch.arange(1, n + 1, device=ascending.device)
    differs = ascending[:, 1:] != ascending[:, :-1]  # a difference of two equal infinities is NaN
    edge = differs.new_ones(len(ascending), 1)
    first = position.where(torch.cat([edge, differs], 1), 0).cummax(1).values
    last = position.where(torch.cat([differs, edge], 1), n).flip(1).cummin(1).values.flip(1)
    return (first + last).double() / 2


def _r_hat(chains: Tensor) -> Tensor:
    """Return √((W (n−1)/n + B/n) / W) of chains (K, n, Q)."""
    n = chains.shape[1]
    within = chains.var(1).mean(0)
    between = chains.mean(1).var(0)  # B/n
    return ((within * (n - 1) / n + between) / within).sqrt()


def _ess(chains: Tensor) -> Tensor:
    """Return the effective sample size of chains (K, n, Q) by Geyer's initial monotone sequence."""
    k, n, q = chains.shape
    autocovariance = _autocovariance(chains)  # (K, n, Q)
    within = (autocovariance[:, 0] * n / (n - 1)).mean(0)
    total = within * (n - 1) / n + (chains.mean(1).var(0) if k > 1 else 0)
    rho = 1 - (within - autocovariance.mean(0)) / total  # (n, Q)
    rho[0] = 1
    even, odd = rho[0 : n - 1 : 2], rho[1:n:2]
    pairs = even + odd  # P_t = ρ_2t + ρ_2t+1, positive and decreasing in theory
    usable = (n - 3) // 2 + 1 if n > 3 else 1  # as in arviz, whose loop ends three lags before the last
    pairs, even = pairs[:usable], even[:usable]
    positive = (pairs > 0).cumprod(0)
    n_pairs = positive.sum(0, keepdim=True).clamp(max=usable - 1)
    kept = torch.arange(usable, device=pairs.device)[:, None] < n_pairs
    monotone = pairs.cummin(0).values.where(kept, 0.0)
    remainder = even.gather(0, n_pairs)[0].clamp(min=0)  # ρ of the first even lag that is left out
    tau = -1 + 2 * monotone.sum(0) + remainder
    tau = tau.clamp(min=1 / math.log10(k * n))
    ess: Tensor = k * n / tau
    return ess.where(chains.isfinite().flatten(0, 1).all(0), math.nan).reshape(q)


def _autocovariance(chains: Tensor) -> Tensor:
    """Return the autocovariance at all lags of chains (K, n, Q), with divisor n, by fast Fourier transforms."""
    n = chains.shape[1]
    size = 2 ** math.ceil(math.log2(2 * n))
    spectrum = torch.fft.rfft(chains - chains.mean(1, keepdim=True), n=size, dim=1)
    power = spectrum.real.square() + spectrum.imag.square()
    sums: Tensor = torch.fft.irfft(power, n=size, dim=1)[:, :n]
    return sums / n
