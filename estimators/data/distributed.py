"""Several processes that fit one estimator: each computes with its shard of the rows, and sums go over all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from estimators.data.batch import Batch
from estimators.data.training_data import TrainingData
from estimators.errors import DataError, ModelError, OptionError
from estimators.numerics.pytrees import select_rows

__all__ = ["ProcessGroup"]

_AGREEMENT = 1e-6
"""Largest relative difference between processes of weights, and of sums over the data, that counts as equal."""


@dataclass(frozen=True)
class ProcessGroup:
    """One process among those that fit an estimator together; a single process by default.

    Args:
        index: the number of this process, 0 <= index < size.
        size: the number of processes.
        engine: an `accelerate.Accelerator`, whose `reduce` adds up tensors; None for a single process.
    """

    index: int = 0
    size: int = 1
    engine: Any = None

    @classmethod
    def of(cls, accelerator: Any) -> ProcessGroup:  # noqa: ANN401
        """Return the processes of an accelerator.

        Args:
            accelerator: an `accelerate.Accelerator`, or None for a single process.

        Returns:
            The group, as this process sees it.

        Raises:
            OptionError: the accelerator is an object of another kind.
        """
        if accelerator is None:
            return cls()
        if not all(hasattr(accelerator, name) for name in ("num_processes", "process_index", "reduce")):
            raise OptionError(
                "an accelerate.Accelerator",
                received=type(accelerator).__name__,
                remedy='pip install "bdl-bench[text]", then accelerator=accelerate.Accelerator().',
            )
        return cls(accelerator.process_index, accelerator.num_processes, accelerator)

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.index == 0

    def shard(self, batch: Batch) -> Batch | None:
        """Return every size-th row of a batch, those of this process; None if it has none."""
        if self.size == 1:
            return batch
        mine = slice(self.index, None, self.size)
        return Batch(select_rows(batch.x, mine), batch.y[mine]) if self.index < len(batch) else None

    def shards(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Return this process's rows of each batch of which it has any."""
        return (shard for shard in map(self.shard, batches) if shard is not None)

    def sum_over_rows(self, mine: Tensor) -> Tensor:
        """Return a sum over all rows, equal in all processes, from the sums over each process's rows."""
        if self.size == 1:
            return mine
        total: Tensor = self.engine.reduce(mine, reduction="sum")
        return total

    def minimum(self, mine: int, device: torch.device) -> int:
        """Return the minimum of a number over all processes, so that they decide alike."""
        if self.size == 1:
            return mine
        numbers = torch.zeros(self.size, dtype=torch.int64, device=device)
        numbers[self.index] = mine
        return int(self.sum_over_rows(numbers).min())

    def check_equal(self, theta: Tensor, batches: TrainingData) -> None:
        """Check that all processes have the same weights and the same training data.

        Args:
            theta: the weights of this process, (P,).
            batches: the training data of this process.

        Raises:
            ModelError: the weights differ.
            DataError: the rows or their number differ.
        """
        if self.size == 1:
            return
        assert batches.checksum is not None
        data = torch.tensor([batches.n_data, batches.checksum.outputs, batches.checksum.targets], dtype=torch.float64)
        data = data.to(theta.device) if theta.device.type != "mps" else data
        if not self._are_equal(theta.detach()):
            raise ModelError(
                "the same weights in every process",
                received="different weights",
                remedy="load one checkpoint in all processes.",
            )
        if not self._are_equal(data):
            raise DataError(
                "the same training rows in every process, of which each takes its shard",
                received="other rows, or another number",
                remedy="pass the whole loader, not one that accelerator.prepare has divided.",
            )

    def _are_equal(self, mine: Tensor) -> bool:
        """Whether all processes have these numbers, up to round-off."""
        mean = self.sum_over_rows(mine.clone()) / self.size
        difference = (mean - mine).abs().max() / mine.abs().max().clamp_min(torch.finfo(mine.dtype).tiny)
        return float(self.sum_over_rows(difference)) <= _AGREEMENT
