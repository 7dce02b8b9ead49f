"""Sample batches: perturbations refitted a few at a time, so that only these have optimizer state in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from estimators.objective.objective import Objective
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.runtime.memory import available_bytes

__all__ = ["SampleBatches", "SolvedBatch", "default_chunk_size", "max_concurrent_samples"]

_COPIES = 8  # vectors per sample: iterate, gradient and its parts, momentum, average
_MEMORY_SHARE = 0.125  # of the available memory


def max_concurrent_samples(displacement: Tensor) -> int:
    """Return how many samples have a state of at most an eighth of the memory, for displacements (K, P)."""
    each = _COPIES * displacement.shape[1] * displacement.element_size()
    return max(1, int(_MEMORY_SHARE * available_bytes(displacement.device)) // each)


@dataclass(frozen=True)
class SolvedBatch:
    """A solved sample batch: displacements (k, P), A-norm errors if known, λ, nonlinearity, learning rate or steps."""

    displacement: Tensor
    a_norm_errors: SampleANormErrors | None
    lam: float
    nonlinearity: float
    rate: float | None = None
    steps: int | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """λ, nonlinearity, learning rate and steps, in JSON types."""
        return {
            "solved_lam": self.lam,
            "nonlinearity": self.nonlinearity,
            "rate": self.rate,
            "solved_steps": self.steps,
        }


@dataclass
class SampleBatches:
    """K perturbations, `size` at a time; a checkpoint keeps the solved ones too."""

    n_samples: int
    size: int
    checkpoint: Checkpoint
    solved: list[SolvedBatch] = field(default_factory=list)
    saved: Learned | None = None  # state that the next sample batch resumes from

    @classmethod
    def resumed(
        cls, n_samples: int, size: int, checkpoint: Checkpoint, saved: Learned | None, device: torch.device
    ) -> SampleBatches:
        """Return the batches that a checkpoint describes."""
        if saved is None:
            return cls(n_samples, size, checkpoint)
        tensors, values = saved
        before = []
        if "solved" in tensors:
            a_norm_errors = (
                SampleANormErrors(tensors["a_norm_errors"].to(device), values["n"])
                if "a_norm_errors" in tensors
                else None
            )
            summary = (values[name] for name in ("solved_lam", "nonlinearity", "rate", "solved_steps"))
            before = [SolvedBatch(tensors["solved"].to(device), a_norm_errors, *summary)]
        return cls(n_samples, values["size"], checkpoint, before, saved)

    def remaining(self) -> Iterator[slice]:
        """Yield the sample batches that are not solved yet."""
        for start in range(self.n_solved, self.n_samples, self.size):
            yield slice(start, start + self.size)

    @property
    def n_solved(self) -> int:
        """Number of solved samples."""
        return sum(len(solved.displacement) for solved in self.solved)

    def add(self, solved: SolvedBatch) -> None:
        """Add a solved batch."""
        self.solved.append(solved)

    def with_checkpoint(self) -> Checkpoint:
        """Return the checkpoint of the next sample batch."""
        return _WithCheckpoint(self, self.checkpoint, self.n_solved)

    @property
    def concatenated(self) -> SolvedBatch:
        """All solved batches as one."""
        known = [solved.a_norm_errors for solved in self.solved if solved.a_norm_errors is not None]
        a_norm_errors = SampleANormErrors.concatenate(known) if len(known) == len(self.solved) else None
        whole = torch.cat([solved.displacement for solved in self.solved])
        rates = [solved.rate for solved in self.solved if solved.rate is not None]
        steps = [solved.steps for solved in self.solved if solved.steps is not None]
        nonlinearity = max(solved.nonlinearity for solved in self.solved)
        lam = self.solved[-1].lam
        return SolvedBatch(whole, a_norm_errors, lam, nonlinearity, min(rates, default=None), max(steps, default=None))


@dataclass(frozen=True)
class _WithCheckpoint(Checkpoint):
    """The state of one sample batch and of the batches solved before it, `number` samples."""

    batches: SampleBatches
    inner: Checkpoint
    number: int

    def load(self) -> Learned | None:
        saved, self.batches.saved = self.batches.saved, None
        if saved is None or saved[1]["number"] != self.number:
            return None
        return {name: tensor for name, tensor in saved[0].items() if name not in ("solved", "a_norm_errors")}, saved[1]

    def save(self, state: Callable[[], Learned]) -> None:
        def combined() -> Learned:
            tensors, values = state()
            values = {**values, "size": self.batches.size, "number": self.number}
            if not self.batches.solved:
                return tensors, values
            before = self.batches.concatenated
            tensors, values = {**tensors, "solved": before.displacement}, {**values, **before.summary}
            if before.a_norm_errors is None:
                return tensors, values
            return {**tensors, "a_norm_errors": before.a_norm_errors.terms}, {**values, "n": before.a_norm_errors.n}

        self.inner.save(combined)


_MAX_VMAP_NUMBERS = 2**20  # in all copies; on a CPU vmap is 8 times as fast at 3·10³ parameters each, slower at 8·10⁵


def default_chunk_size(objective: Objective) -> int:
    """Return the number of copies in one vectorised call: limited by memory, on a CPU by speed; 1 for convolutions."""
    modules, chunk_size = objective.network.module.modules(), objective.network.vectors_at_once
    if objective.theta.device.type != "cpu":
        return chunk_size
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in modules):
        return 1
    return min(chunk_size, max(1, _MAX_VMAP_NUMBERS // objective.theta.numel()))
