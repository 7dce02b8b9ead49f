"""A progress bar on a terminal, asked for by `progress_bar=True`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(items: Sequence[T], description: str, *, shown: bool) -> Iterable[T]:
    """`items`, with a bar where `shown`."""
    if not shown:
        return items
    from rich.progress import track as rich_track

    return rich_track(items, description=description, transient=True)
