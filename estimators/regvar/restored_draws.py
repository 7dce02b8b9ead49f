"""Variance estimates of posterior draws from a saved fit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from estimators.curvature.dense.cholesky import DensePrecision
from estimators.models.network import Network
from estimators.regvar.bounds import VarianceBounds
from estimators.regvar.exact_draws import ExactDraws
from estimators.regvar.measured_bounds import MeasuredAccuracy, MeasuredBounds
from estimators.regvar.monte_carlo import BoundInterpolation, ClippedMonteCarlo, InterpolatedBounds, MonteCarloVariance
from estimators.regvar.rao_blackwell import RaoBlackwellBlock

__all__ = ["restored_draws"]


def restored_draws(network: Network, tensors: dict[str, Tensor], learned: dict[str, Any]) -> MonteCarloVariance:
    """Return the estimate of posterior draws that its `state` describes."""
    block = (
        None
        if learned["last_layer"] is None
        else RaoBlackwellBlock.restored(network, tensors["block"], learned["last_layer"])
    )
    draws = MonteCarloVariance(network, tensors["displacement"], block, learned["rao_blackwell"])
    if "cholesky" in tensors:
        precision = DensePrecision.factored(tensors["cholesky"], allows_float32=learned["allows_float32"])
        return ExactDraws(draws, precision, learned["round_off"])
    if "accuracy" in learned:
        accuracy = MeasuredAccuracy.restored(learned["accuracy"])
        bounds = VarianceBounds.restored(network, tensors, block, accuracy.leading)
        return MeasuredBounds(draws, bounds, accuracy)
    if "interpolation" not in learned:
        return draws
    kind = ClippedMonteCarlo if learned.get("clipped") else InterpolatedBounds
    bounds = VarianceBounds.restored(network, tensors, block)
    return kind(draws, bounds, BoundInterpolation(**learned["interpolation"]))
