"""The No-U-Turn sampler of nutpie, an independent implementation that checks the chains of this package."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from estimators.errors import ReferenceNotReachedError
from estimators.runtime.optional import optional_module

__all__ = ["NutsDraws", "sample_nuts"]

_TUNE = 300
"""Draws of the warm-up of each chain."""
_SECONDS_BETWEEN_CHECKS = 0.02
"""Seconds between two looks at the budget."""


@dataclass(frozen=True)
class NutsDraws:
    """Draws of NUTS, after the warm-up.

    Attributes:
        z: (K, S, D).
        divergences: divergent trajectories.
        acceptance: mean acceptance rate.
        energies: the Hamiltonian, (K, S).
    """

    z: Tensor
    divergences: int
    acceptance: float
    energies: Tensor


def sample_nuts(
    gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    starts: Tensor,
    n_draws: int,
    *,
    max_gradients: int,
    seed: int,
    progress_bar: bool,
) -> NutsDraws:
    """Return draws of NUTS (Hoffman & Gelman 2014) by nutpie, one chain after another.

    Args:
        gradient: z (1, D) -> U (1,) and ∇U (1, D).
        starts: a start of each chain, (K, D).
        n_draws: S, the draws of each chain after 300 of warm-up.
        max_gradients: the budget, summed over chains.
        seed: the seed.
        progress_bar: whether to show progress.

    Returns:
        The draws.

    Raises:
        UnsupportedError: if nutpie is not installed.
        ReferenceNotReachedError: the budget is spent.
    """
    install = '"bdl-bench[reference]"'
    purpose = 'sample by engine="nutpie"'
    nutpie = optional_module("nutpie", purpose=purpose, install=install)
    compiled = optional_module("nutpie.compiled_pyfunc", purpose=purpose, install=install)
    (k, d), density = starts.shape, _LogDensity(gradient, starts)
    points = cycle(starts.detach().cpu().double().numpy())

    def expand(*_: Any) -> Callable[..., dict[str, NDArray[np.float64]]]:  # noqa: ANN401
        return lambda z, **_: {"z": z}

    def initial_point(_: int) -> NDArray[np.float64]:
        return next(points)

    model = compiled.from_pyfunc(
        d, lambda: density, expand, [np.dtype("float64")], [(d,)], ["z"], make_initial_point_fn=initial_point
    )
    sampler = nutpie.sample(
        model,
        draws=n_draws,
        tune=_TUNE,
        chains=k,
        cores=1,
        seed=seed % 2**32,
        progress_bar=progress_bar,
        blocking=False,
    )

    def check() -> None:
        if density.failures:
            raise density.failures[0]
        if density.n_calls > max_gradients:
            raise ReferenceNotReachedError(
                f"{k} chains of {_TUNE + n_draws} draws within max_gradients={max(0, max_gradients):,}",
                received="a spent budget",
                remedy="a larger max_gradients, or fewer n_draws.",
            )

    found = _waited_for(sampler, check)
    statistics = found.sample_stats
    return NutsDraws(
        torch.from_numpy(np.array(found.posterior["z"])).to(starts),
        int(np.array(statistics["diverging"]).sum()),
        float(np.array(statistics["mean_tree_accept"]).mean()),
        torch.from_numpy(np.array(statistics["energy"])),
    )


class _LogDensity:
    """log p(z) = −U(z) and its gradient, for the threads of nutpie: an exception in one of them would end the process.

    Attributes:
        n_calls: number of calls.
        failures: exceptions that were caught; −∞ was returned instead.
    """

    def __init__(self, gradient: Callable[[Tensor], tuple[Tensor, Tensor]], like: Tensor) -> None:
        self.gradient, self.like = gradient, like
        self.n_calls, self.failures = 0, list[Exception]()

    def __call__(self, z: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        self.n_calls += 1
        try:
            energy, slope = self.gradient(torch.from_numpy(np.array(z))[None].to(self.like))
        except Exception as error:
            self.failures.append(error)
            return -np.inf, np.zeros_like(z)
        return -float(energy[0]), -slope[0].double().cpu().numpy()


def _waited_for(sampler: Any, check: Callable[[], None]) -> Any:  # noqa: ANN401
    """Return what the sampler has drawn, or end it if `check` raises."""
    found = None
    try:
        while found is None:
            with suppress(TimeoutError):
                found = sampler.wait(timeout=_SECONDS_BETWEEN_CHECKS)
            check()
    except BaseException:
        if found is None:
            sampler.cancel()
        raise
    return found
