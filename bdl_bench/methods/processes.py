"""Gaussian processes as sanity baselines: of the inputs, and of the linearized network."""

from __future__ import annotations

from bdl_bench.methods.registry import PRIOR, Method, preset
from estimators.baselines import GaussianProcess, NTKGaussianProcess

__all__ = ["PRESETS"]

PRESETS = [
    Method(
        "gp",
        "a Gaussian process of the inputs with an RBF kernel fitted by marginal likelihood; no network",
        preset(GaussianProcess),
    ),
    Method(
        "ntk-gp",
        "the Gaussian process of the linearized network: Laplace with the mean of its posterior",
        preset(NTKGaussianProcess),
        tuned_option=PRIOR,
    ),
]
