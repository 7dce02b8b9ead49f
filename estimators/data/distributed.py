"""Several processes that fit one estimator: each takes rows of every batch, or draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from estimators.data.batch import Batch
from estimators.data.training_data import TrainingData
from estimators.errors import DataError, ModelError, OptionError
from estimators.numerics.pytrees import select_rows

__all__ = ["ProcessGroup"]


@dataclass(frozen=True)
class ProcessGroup:
    """Group of processes that share a fit; a single process is a group of size 1.

    Args:
        index: the number of this process, from 0.
        size: the number of processes.
        engine: an `accelerate.Accelerator`, whose `reduce` adds tensors over processes; None for one process.
        shares: what the processes divide. "rows": each takes rows of every batch, and `total` adds the sums over rows.
            "draws": each takes some draws with all rows, and `together` collects the draws.
    """

    index: int = 0
    size: int = 1
    engine: Any = None
    shares: str = "rows"

    @classmethod
    def of(cls, accelerator: Any) -> ProcessGroup:  # noqa: ANN401
        """Return the processes of an `accelerate.Accelerator`, one for None; raise OptionError for anything else."""
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
        """Whether this process writes files."""
        return self.index == 0

    def sharing(self, what: str) -> Self:
        """Return the group with processes that divide `what`, "rows" or "draws"."""
        return replace(self, shares=what)

    def part(self, batch: Batch) -> Batch | None:
        """Return the rows of a batch that this process takes, every `size`-th; None if there are none."""
        if self.size == 1 or self.shares == "draws":
            return batch
        mine = slice(self.index, None, self.size)
        return Batch(select_rows(batch.x, mine), batch.y[mine]) if self.index < len(batch) else None

    def parts(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Return the rows of each batch that this process takes, without empty batches."""
        return (part for part in map(self.part, batches) if part is not None)

    def total(self, mine: Tensor) -> Tensor:
        """Return a sum over rows from the sums of each process; it is the same in all processes."""
        return mine if self.shares == "draws" else self._sum(mine)

    @property
    def draws(self) -> slice:
        """Indices of the draws that this process takes."""
        return slice(self.index, None, self.size) if self.shares == "draws" else slice(None)

    def over_draws(self, mine: Tensor) -> Tensor:
        """Return a sum over draws from the sums of each process; it is the same in all processes."""
        return self._sum(mine) if self.shares == "draws" else mine

    def together(self, mine: Tensor, n_draws: int) -> Tensor:
        """Return the rows of all draws, (K, P), from those of each process."""
        if self.size == 1 or self.shares == "rows":
            return mine
        whole = mine.new_zeros(n_draws, *mine.shape[1:])
        whole[self.draws] = mine
        return self._sum(whole)

    def least(self, mine: int, device: torch.device) -> int:
        """Return the smallest number of all processes, so that processes that share rows decide alike."""
        if self.size == 1 or self.shares == "draws":
            return mine
        numbers = torch.zeros(self.size, dtype=torch.int64, device=device)
        numbers[self.index] = mine
        return int(self._sum(numbers).min())

    def _sum(self, mine: Tensor) -> Tensor:
        if self.size == 1:
            return mine
        total: Tensor = self.engine.reduce(mine, reduction="sum")
        return total

    def check_alike(self, theta: Tensor, batches: TrainingData) -> None:
        """Raise ModelError or DataError if the weights or the data differ between processes."""
        if self.size == 1:
            return
        assert batches.sums is not None
        data = torch.tensor([batches.n_data, batches.sums.outputs, batches.sums.targets], dtype=torch.float64)
        data = data.to(theta.device) if theta.device.type != "mps" else data
        if not self._agree(theta.detach()):
            raise ModelError(
                "the same weights in every process", received="others", remedy="load one checkpoint in all of them."
            )
        if not self._agree(data):
            raise DataError(
                "the same training rows in every process, which share them out themselves",
                received="others, or another number",
                remedy="pass the whole loader, not one that accelerator.prepare has divided.",
            )

    def _agree(self, mine: Tensor) -> bool:
        mean = self.total(mine.clone()) / self.size
        apart = (mean - mine).abs().max() / mine.abs().max().clamp_min(torch.finfo(mine.dtype).tiny)
        return float(self.total(apart)) <= 1e-6
