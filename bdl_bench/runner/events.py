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
    """A change in the state of a job; the training has no method.

    `status` is "planned" (for all jobs, at first), "waiting" for another run that has locked it, "started", and then
    one of `ENDINGS`. `seconds` are those of the training, or of fit, tuning and prediction.
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
