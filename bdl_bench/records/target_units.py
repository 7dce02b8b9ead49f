"""Arrays of a record in the original unit of the target, for a Gaussian with `target_shift` and `target_scale`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bdl_bench.metrics.fidelity import HALVES
from estimators.likelihoods import Gaussian, Likelihood

__all__ = ["in_target_units"]

Arrays = dict[str, NDArray[Any]]
_LOCATIONS = ("mean", "targets", *(f"{half}_mean" for half in HALVES))
_VARIANCES = ("epistemic_variance", "total_variance", *(f"{half}_epistemic_variance" for half in HALVES))


def in_target_units(arrays: Arrays, likelihood: Likelihood) -> Arrays:
    """Return arrays of a regression in the original unit: shift + scale · y for y, scale² for variances.

    A density changes by the factor 1/scale for each output, so that log scale is added to the joint NLL per label. An
    energy score of several outputs with different scales cannot be converted, and is left out.

    Args:
        arrays: by name, with or without the prefix of a set; in the units of the network's outputs.
        likelihood: that of the problem.

    Returns:
        The arrays, unchanged for other likelihoods and for a Gaussian without units.
    """
    if not isinstance(likelihood, Gaussian):
        return arrays
    shift, scale = (_array(value) for value in (likelihood.target_shift, likelihood.target_scale))
    if not shift.any() and (scale == 1).all():
        return arrays
    n_outputs = next((array.shape[-1] for name, array in arrays.items() if name.rpartition("/")[2] == "mean"), 1)
    log_scale = float(np.broadcast_to(np.log(scale), n_outputs).sum())
    converted: Arrays = {}
    for name, array in arrays.items():
        quantity = name.rpartition("/")[2]
        if quantity in _LOCATIONS:
            converted[name] = shift + scale * array
        elif quantity in _VARIANCES:
            converted[name] = scale**2 * array
        elif quantity == "joint_nll":
            converted[name] = array + log_scale
        elif quantity != "energy_score":
            converted[name] = array
        elif np.ptp(scale) == 0:
            converted[name] = scale.flat[0] * array
    return converted


def _array(value: float | Tensor) -> NDArray[np.float64]:
    found = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return np.asarray(found, dtype=np.float64)
