"""An objective in float64: the same weights and data, on a copy, for sums that float32 would leave without digits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from estimators.batch import Batch, Loader, split_batch
from estimators.batches import AbsentBatches
from estimators.network import Network, structural_copy
from estimators.objective import Objective
from estimators.precision.dtype import algebra_dtype
from estimators.pytrees import PyTree, with_floats

__all__ = ["widened"]


def widened(objective: Objective) -> Objective:
    """The objective in `algebra_dtype`; itself where it is in that already."""
    dtype = algebra_dtype(objective.theta.device)
    if objective.theta.dtype == dtype:
        return objective
    network = Network(_wide_copy(objective.network.module, dtype), list(objective.network.subset.shapes))
    network.ledger = objective.network.ledger
    prior = replace(objective.prior, precision=objective.prior.precision.to(dtype), mean=objective.prior.mean.to(dtype))
    batches = objective.batches
    if not isinstance(batches, AbsentBatches):
        stored = None if batches.stored is None else tuple(_wide_batch(batch, dtype) for batch in batches.stored)
        batches = replace(batches, loader=_Wide(batches.loader, dtype), stored=stored)
    return replace(objective, network=network, prior=prior, batches=batches)


@dataclass(frozen=True)
class _Wide:
    """A loader's batches in another dtype."""

    loader: Loader
    dtype: torch.dtype

    def __iter__(self) -> Iterator[tuple[PyTree, Tensor]]:
        for item in self.loader:
            batch = _wide_batch(split_batch(item), self.dtype)
            yield batch.x, batch.y


def _wide_batch(batch: Batch, dtype: torch.dtype) -> Batch:
    return Batch(*with_floats((batch.x, batch.y), dtype))


def _wide_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """New modules with new tensors: `module.to` would change those of the user, which a structural copy shares."""
    module, made = structural_copy(model), dict[int, nn.Parameter]()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                wide = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
                part._parameters[name] = made.setdefault(id(parameter), wide)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)
    return module
