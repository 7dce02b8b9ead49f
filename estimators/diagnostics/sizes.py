"""The sizes that costs depend on, and two timings: of a pass over the data, and of dense algebra."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.curvature.layerwise.factored_dual import in_factors
from estimators.data.training_data import TrainingData
from estimators.diagnostics.context import DiagnosticContext
from estimators.errors import EstimatorError
from estimators.models.last_linear import find_last_linear
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree, n_rows
from estimators.runtime.memory import available_bytes

__all__ = ["Sizes"]

_SQUARE = 384


@dataclass(frozen=True)
class Sizes:
    """N rows, C outputs, P parameters; bytes of a number of the network and of dense algebra; seconds.

    maps: (outputs, inputs) of each linear map of the subset; in_factors: all at one place a row. head: C·(D + 1) of the
    last layer, None where it has no closed form. seconds_of_checks: what every fit takes before it begins.
    seconds_a_pass: forward and backward over the training rows. seconds_a_flop: of a dense product.
    """

    n_data: int
    n_outputs: int
    n_parameters: int
    element: int
    algebra: int
    maps: tuple[tuple[int, int], ...]
    in_factors: bool
    head: int | None
    available: int
    seconds_of_checks: float
    seconds_a_pass: float
    seconds_a_flop: float

    @classmethod
    def of(cls, subject: DiagnosticContext) -> Sizes:
        """Of a network and its data: a batch goes through it three times, and all of the rows twice."""
        network, batches = subject.objective.network, subject.objective.batches
        theta, x = network.theta, next(iter(batches)).x
        dtype = algebra_dtype(theta.device)
        layers = LayerwiseJacobian(network, x)
        one = theta.new_ones(1, n_rows(x), subject.n_outputs)
        seconds = _seconds(lambda: network.vjp(x, one), theta.device)
        return cls(
            n_data=batches.n_data,
            n_outputs=subject.n_outputs,
            n_parameters=theta.numel(),
            element=theta.element_size(),
            algebra=dtype.itemsize,
            maps=tuple(linear.shape for linear in layers.maps.values()),
            in_factors=in_factors(layers),
            head=_head(subject),
            available=available_bytes(theta.device),
            seconds_of_checks=_seconds_of_checks(subject),
            seconds_a_pass=seconds * batches.n_data / n_rows(x),
            seconds_a_flop=_seconds_a_flop(theta, dtype),
        )


@dataclass(frozen=True)
class _Pairs:
    """Batches as a loader gives them, none of them kept."""

    batches: TrainingData

    def __iter__(self) -> Iterator[tuple[PyTree, Tensor]]:
        return ((batch.x, batch.y) for batch in self.batches)


def _head(subject: DiagnosticContext) -> int | None:
    network = subject.objective.network
    try:
        layer = find_last_linear(network.module, next(iter(subject.objective.batches)).x)
    except EstimatorError:
        return None
    parameters = dict(network.module.named_parameters(remove_duplicate=False))
    return sum(parameters[name].numel() for name in layer.parameter_names)


def _seconds_of_checks(subject: DiagnosticContext) -> float:
    """Two passes with every batch validated."""
    objective = subject.objective
    start = _now(objective.theta.device)
    TrainingData.checked(_Pairs(objective.batches), objective.network, objective.likelihood)
    return _now(objective.theta.device) - start


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The faster of two, after one to warm up."""
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


def _seconds_a_flop(theta: Tensor, dtype: torch.dtype) -> float:
    square = torch.ones(_SQUARE, _SQUARE, dtype=dtype, device=theta.device)
    return _seconds(lambda: square @ square, theta.device) / (2 * _SQUARE**3)
