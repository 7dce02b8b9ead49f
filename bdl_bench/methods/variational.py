"""Variational inference: Gaussians over all weights or the last layer that maximise a bound of the evidence."""

from __future__ import annotations

from bdl_bench.methods.registry import PRIOR, Method, preset
from estimators.variational import IVON, VBLL, MeanFieldVI

__all__ = ["PRESETS"]

PRESETS = [
    Method(
        "mean-field-vi",
        "mean-field variational inference by the reparametrisation gradient, from the trained weights",
        preset(MeanFieldVI, seeded=True),
        tuned_option=PRIOR,
    ),
    Method(
        "ivon",
        "IVON: mean-field variational inference as an adaptive optimizer, from the trained weights",
        preset(IVON, seeded=True),
        tuned_option=PRIOR,
    ),
    Method(
        "vbll",
        "variational Bayesian last layer on the trained features",
        preset(VBLL),
        tuned_option=PRIOR,
    ),
]
