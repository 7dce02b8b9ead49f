"""An objective in float64: a copy with the same weights and data, for sums in which float32 loses all digits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from estimators.data.batch import Batch, Loader, split_batch
from estimators.data.training_data import AbsentTrainingData
from estimators.models.network import Network
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree, with_floats
from estimators.objective.objective import Objective

__all__ = ["network_in_float64", "to_dtype", "to_float64"]


def to_float64(objective: Objective) -> Objective:
    """Return the objective in `algebra_dtype`; the objective itself if it is in that dtype already."""
    return to_dtype(objective, algebra_dtype(objective.theta.device))


def to_dtype(objective: Objective, dtype: torch.dtype) -> Objective:
    """Return the objective in a dtype; the objective itself if it is in that dtype already.

    Args:
        objective: the objective.
        dtype: the dtype of weights, inputs and sums.
    """
    if objective.theta.dtype == dtype:
        return objective
    network = network_in_float64(objective.network, dtype)
    prior = replace(objective.prior, precision=objective.prior.precision.to(dtype), mean=objective.prior.mean.to(dtype))
    batches = objective.batches
    if not isinstance(batches, AbsentTrainingData):
        stored = None if batches.stored is None else tuple(_converted_batch(batch, dtype) for batch in batches.stored)
        batches = replace(batches, loader=_ConvertedLoader(batches.loader, dtype), stored=stored)
    return replace(objective, network=network, prior=prior, batches=batches)


def network_in_float64(network: Network, dtype: torch.dtype) -> Network:
    """Return the network in a dtype, with the same pass counter; the network itself if it is in that dtype already."""
    if network.theta.dtype == dtype:
        return network
    stored = network.check.stored or network.check.reference
    converted = Network(network.module, list(network.subset.shapes), dtype=dtype, stored=stored)
    converted = converted.counted_by(network.pass_counter)
    converted.result_dtype = network.result_dtype or network.theta.dtype
    converted.routes = network.routes  # found for the same module
    return converted


@dataclass(frozen=True)
class _ConvertedLoader:
    """A loader whose batches are converted to another dtype."""

    loader: Loader
    dtype: torch.dtype

    def __iter__(self) -> Iterator[tuple[PyTree, Tensor]]:
        for item in self.loader:
            batch = _converted_batch(split_batch(item), self.dtype)
            yield batch.x, batch.y


def _converted_batch(batch: Batch, dtype: torch.dtype) -> Batch:
    return Batch(*with_floats((batch.x, batch.y), dtype))
