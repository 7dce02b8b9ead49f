"""Several processes that fit one estimator: each takes its rows of every batch, or its draws; sums go over all."""

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
    """Process `index` of `size`; `engine` adds up tensors. By itself a process is a team of one.

    `shares` is what they divide among them: "rows", those of every batch, whose sums `total` adds up; or "draws", the
    replicas, with all rows for each, which are put together in the end.
    """

    index: int = 0
    size: int = 1
    engine: Any = None
    shares: str = "rows"

    @classmethod
    def of(cls, accelerator: Any) -> ProcessGroup:  # noqa: ANN401
        """The processes of an `accelerate.Accelerator`; None for one. Errors: OptionError."""
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
        """Whether it is the one that writes files."""
        return self.index == 0

    def sharing(self, what: str) -> Self:
        """The same processes, with other shares."""
        return replace(self, shares=what)

    def part(self, batch: Batch) -> Batch | None:
        """Its rows of a batch, every size-th; None where there are none."""
        if self.size == 1 or self.shares == "draws":
            return batch
        mine = slice(self.index, None, self.size)
        return Batch(select_rows(batch.x, mine), batch.y[mine]) if self.index < len(batch) else None

    def parts(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Its rows of each batch that has some."""
        return (part for part in map(self.part, batches) if part is not None)

    def total(self, mine: Tensor) -> Tensor:
        """A sum over rows, from the sums over those of each process; alike in all."""
        return mine if self.shares == "draws" else self._sum(mine)

    @property
    def draws(self) -> slice:
        """Its draws."""
        return slice(self.index, None, self.size) if self.shares == "draws" else slice(None)

    def over_draws(self, mine: Tensor) -> Tensor:
        """A sum over draws, from the sums over those of each process; alike in all."""
        return self._sum(mine) if self.shares == "draws" else mine

    def together(self, mine: Tensor, n_draws: int) -> Tensor:
        """The rows of all draws, (K, P), from those of each process."""
        if self.size == 1 or self.shares == "rows":
            return mine
        whole = mine.new_zeros(n_draws, *mine.shape[1:])
        whole[self.draws] = mine
        return self._sum(whole)

    def least(self, mine: int, device: torch.device) -> int:
        """The least of all processes' numbers, by which they decide alike where they share rows."""
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
        """Refuse weights or data that are not the same in all processes. Errors: ModelError, DataError."""
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
