"""Checkpoints: the state of an unfinished fit in one file, from which a new process continues."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from estimators.errors import StateError
from estimators.persistence.state import ABOUT, PROGRESS, TUNING, About, FittedState, Learned, read_file, write_file
from estimators.runtime.pass_counter import PassCounter, RowCounts

__all__ = ["Checkpoint", "CheckpointFile"]

_SECONDS = 30.0
"""Least time between two writes of a checkpoint."""


class Checkpoint:
    """Store for the state of a fit. This base class keeps nothing, for fits without a checkpoint."""

    keeps: ClassVar[bool] = False

    def load(self) -> Learned | None:
        """Return tensors and JSON values of the last `save`; None if there is none."""
        return None

    def save(self, state: Callable[[], Learned]) -> None:
        """Save `state()` if the last write is old enough; called after every step of a loop."""

    def dtype(self) -> str | None:
        """Return the dtype of the last solve that was saved, as text; None if there is none."""
        return None

    def for_problem(self, marks: Tensor) -> Checkpoint:  # noqa: ARG002
        """Return the checkpoint for a problem with these marks, numbers that a resumed fit must reproduce.

        What a solve in another dtype than that of the marks has saved is not loaded.
        """
        return self


@dataclass
class CheckpointFile(Checkpoint):
    """Checkpoint in a safetensors file of one estimator on one model and data, with the pass counter.

    At the end `UncertaintyEstimator.fit` replaces it by the fit.
    """

    keeps: ClassVar[bool] = True

    path: Path
    about: About
    pass_counter: PassCounter
    writes: bool = True  # only one of several processes does
    marks: list[float] = field(default_factory=list)
    marks_dtype: str | None = None
    written: float = field(default_factory=time.monotonic)

    def for_problem(self, marks: Tensor) -> CheckpointFile:
        return replace(self, marks=marks.double().tolist(), marks_dtype=str(marks.dtype))

    def dtype(self) -> str | None:
        state = self._state()
        progress = None if state is None else About.of(state).learned.get(PROGRESS)
        return None if progress is None else progress["dtype"]

    def finished(self) -> FittedState | None:
        """Return the finished fit, or None; raise StateError or ModelChangedError for a file of another fit."""
        state = self._state()
        return None if state is None or About.of(state).unfinished else state

    def load(self) -> Learned | None:
        state = self._state()
        if state is None:
            return None
        progress = About.of(state).learned[PROGRESS]
        if progress["dtype"] != self.marks_dtype:
            return None
        self._check(progress["marks"])
        self.pass_counter.phases = {name: RowCounts(**rows) for name, rows in progress["passes"].items()}
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}, progress["values"]

    def save(self, state: Callable[[], Learned]) -> None:
        if not self.writes or time.monotonic() - self.written < _SECONDS:
            return
        tensors, values = state()
        passes = {name: asdict(rows) for name, rows in self.pass_counter.phases.items()}
        progress = {"values": values, "marks": self.marks, "dtype": self.marks_dtype, "passes": passes}
        write_file({**tensors, ABOUT: replace(self.about, learned={PROGRESS: progress}).to_json()}, self.path)
        self.written = time.monotonic()

    def _state(self) -> FittedState | None:
        if not self.path.exists():
            return None
        state = read_file(self.path)
        about = About.of(state)
        if TUNING in state:
            raise StateError(
                "a checkpoint of a fit",
                received=f"a tuned estimator at {self.path}",
                remedy="name another file, or read it by Tuned.load(path, estimator).",
            )
        about.check(self.about.estimator, self.about.options, self.about.model)
        if about.n_data != self.about.n_data or not about.checksum.agrees(self.about.checksum):
            raise StateError(
                f"a checkpoint of these {self.about.n_data} training rows",
                received=f"one of {about.n_data} rows with other inputs or targets",
                remedy="fit with the loader that was fitted, or name another file.",
            )
        return state

    def _check(self, marks: list[float]) -> None:
        here, there = torch.tensor(self.marks), torch.tensor(marks)
        if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-4):
            raise StateError(
                "training rows in the order of the fit that was interrupted, which its noise was drawn in",
                received="another order",
                remedy="a loader without shuffling, or with a seeded generator; or fit anew, without the file.",
            )
