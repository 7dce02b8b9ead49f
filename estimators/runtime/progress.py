"""Progress bar on a terminal, for `progress_bar=True`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from estimators.runtime.optional import optional_module

__all__ = ["track"]

T = TypeVar("T")


def track(items: Sequence[T], description: str, *, shown: bool) -> Iterable[T]:
    """Return `items`, with a progress bar if `shown`."""
    if not shown:
        return items
    progress = optional_module("rich.progress", purpose="show a progress bar", install="rich")
    shown_items: Iterable[T] = progress.track(items, description=description, transient=True)
    return shown_items
