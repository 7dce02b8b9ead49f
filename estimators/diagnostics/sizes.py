"""The sizes that costs depend on, and the measured times of a pass over the data and of dense algebra."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.curvature.layerwise.factored_dual import in_factors
from estimators.data.batch import PairLoader
from estimators.data.training_data import TrainingData
from estimators.diagnostics.context import DiagnosticContext
from estimators.errors import EstimatorError
from estimators.models.last_linear import find_last_linear
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import n_rows
from estimators.runtime.memory import available_bytes

__all__ = ["Sizes"]

_MATRIX_SIZE = 384
"""The size of the matrix product that is timed."""


@dataclass(frozen=True)
class Sizes:
    """The sizes and times of a problem.

    Attributes:
        n_data: the number N of rows.
        n_outputs: the number C of outputs.
        n_parameters: the number P of parameters.
        element: bytes of a number of the network.
        algebra: bytes of a number in dense algebra.
        maps: (outputs, inputs) of each linear map of the subset.
        in_factors: whether each weight is used once per row.
        last_layer: the number C·(D + 1) of parameters of the last layer; None if it has no closed form.
        available: free memory in bytes.
        seconds_of_checks: the time of the checks before every fit.
        seconds_per_pass: the time of a forward and backward pass over the training rows.
        seconds_per_flop: the time of a floating-point operation in a dense product.
    """

    n_data: int
    n_outputs: int
    n_parameters: int
    element: int
    algebra: int
    maps: tuple[tuple[int, int], ...]
    in_factors: bool
    last_layer: int | None
    available: int
    seconds_of_checks: float
    seconds_per_pass: float
    seconds_per_flop: float

    @classmethod
    def of(cls, context: DiagnosticContext) -> Sizes:
        """Measure a network and its data, with three passes of one batch and two passes of all rows."""
        network, batches = context.objective.network, context.objective.batches
        theta, x = network.theta, next(iter(batches)).x
        dtype = algebra_dtype(theta.device)
        layers = LayerwiseJacobian(network, x)
        one = theta.new_ones(1, n_rows(x), context.n_outputs)
        seconds = _seconds(lambda: network.vjp(x, one), theta.device)
        return cls(
            n_data=batches.n_data,
            n_outputs=context.n_outputs,
            n_parameters=theta.numel(),
            element=theta.element_size(),
            algebra=dtype.itemsize,
            maps=tuple(linear.shape for linear in layers.maps.values()),
            in_factors=in_factors(layers),
            last_layer=_last_layer_size(context),
            available=available_bytes(theta.device),
            seconds_of_checks=_seconds_of_checks(context),
            seconds_per_pass=seconds * batches.n_data / n_rows(x),
            seconds_per_flop=_seconds_per_flop(theta, dtype),
        )


def _last_layer_size(context: DiagnosticContext) -> int | None:
    network = context.objective.network
    try:
        layer = find_last_linear(network.module, next(iter(context.objective.batches)).x)
    except EstimatorError:
        return None
    parameters = dict(network.module.named_parameters(remove_duplicate=False))
    return sum(parameters[name].numel() for name in layer.parameter_names)


def _seconds_of_checks(context: DiagnosticContext) -> float:
    """Return the time of two passes in which every batch is validated."""
    objective = context.objective
    start = _now(objective.theta.device)
    TrainingData.checked(PairLoader(objective.batches), objective.network, objective.likelihood)
    return _now(objective.theta.device) - start


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shorter time of two calls after a warm-up call."""
    found = []
    for _ in range(3):
        start = _now(device)
        work()
        found.append(_now(device) - start)
    return min(found[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seconds_per_flop(theta: Tensor, dtype: torch.dtype) -> float:
    square = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype, device=theta.device)
    return _seconds(lambda: square @ square, theta.device) / (2 * _MATRIX_SIZE**3)
