"""What a grid tells of itself while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ENDINGS", "Event", "Listener"]

ENDINGS = ("trained", "cached", "ok", "skipped", "failed")


@dataclass(frozen=True)
class Event:
    """A step of a grid, and what became of it; a method of None is the training.

    Statuses: planned (all of them, at first); waiting, for another run that is at it; started; then one of `ENDINGS`.
    `seconds` are those of the training, or of fit and prediction.
    """

    task: str
    seed: int
    method: str | None
    status: str
    seconds: float | None = None
    reason: str | None = None

    @property
    def step(self) -> tuple[str, int, str | None]:
        """Which one it is."""
        return self.task, self.seed, self.method


Listener = Callable[[Event], None]
