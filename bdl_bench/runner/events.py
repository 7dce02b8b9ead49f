"""Progress events of a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ENDINGS", "Event", "JobId", "Listener"]

ENDINGS = ("trained", "cached", "ok", "skipped", "failed")

JobId = tuple[str, int, str | None]
"""Task, seed and method of a job; a method of None is the training."""


@dataclass(frozen=True)
class Event:
    """A change in the state of a job.

    Attributes:
        task: name of the task.
        seed: seed of the job.
        method: name of the method; None for the training.
        status: "planned" (for all jobs, at first); "waiting" for another run that has locked it; "started"; then one
            of `ENDINGS`.
        seconds: of the training, or of fit and prediction.
        reason: why the job was skipped or failed.
    """

    task: str
    seed: int
    method: str | None
    status: str
    seconds: float | None = None
    reason: str | None = None

    @property
    def job(self) -> JobId:
        """Return task, seed and method of the job."""
        return self.task, self.seed, self.method


Listener = Callable[[Event], None]
