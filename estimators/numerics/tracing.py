"""Whether torch records what is computed, for an exported module: nothing may then depend on values of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["is_tracing", "tracing"]

_TRACING: ContextVar[bool] = ContextVar("tracing", default=False)


def is_tracing() -> bool:
    """Return whether operations are recorded: self-checks and pass counters then do nothing."""
    return _TRACING.get()


@contextmanager
def tracing() -> Iterator[None]:
    """Record what is computed inside the context, without self-checks and pass counts."""
    token = _TRACING.set(True)
    try:
        yield
    finally:
        _TRACING.reset(token)
