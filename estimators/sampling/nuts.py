"""The No-U-Turn sampler of nutpie, an independent implementation that checks the chains of this package."""

from __future__ import annotations

from collections.abc import Callable
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
    (k, d), n_calls = starts.shape, 0
    points = cycle(starts.detach().cpu().double().numpy())

    def log_density() -> Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]]:
        def value(z: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            nonlocal n_calls
            n_calls += 1
            if n_calls > max_gradients:
                raise RuntimeError("the budget is spent")  # nutpie stops at any exception
            energy, slope = gradient(torch.from_numpy(np.array(z))[None].to(starts))
            return -float(energy[0]), -slope[0].double().cpu().numpy()

        return value

    def expand(*_: Any) -> Callable[..., dict[str, NDArray[np.float64]]]:  # noqa: ANN401
        return lambda z, **_: {"z": z}

    def initial_point(_: int) -> NDArray[np.float64]:
        return next(points)

    model = compiled.from_pyfunc(
        d, log_density, expand, [np.dtype("float64")], [(d,)], ["z"], make_initial_point_fn=initial_point
    )
    try:
        found = nutpie.sample(
            model, draws=n_draws, tune=_TUNE, chains=k, cores=1, seed=seed % 2**32, progress_bar=progress_bar
        )
    except RuntimeError as error:
        if n_calls <= max_gradients:
            raise
        raise ReferenceNotReachedError(
            f"{k} chains of {_TUNE + n_draws} draws within max_gradients={max_gradients:,}",
            received="a spent budget",
            remedy="a larger max_gradients, or fewer n_draws.",
        ) from error
    statistics = found.sample_stats
    return NutsDraws(
        torch.from_numpy(np.array(found.posterior["z"])).to(starts),
        int(np.array(statistics["diverging"]).sum()),
        float(np.array(statistics["mean_tree_accept"]).mean()),
        torch.from_numpy(np.array(statistics["energy"])),
    )
