"""One item tried in another process; its outcome comes back as plain bytes, an exception with its traceback."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["RemoteTraceback", "attempted", "outcome_of", "tried"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class RemoteTraceback(Exception):
    """The cause of an exception that came from another process: its traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def tried(work: Callable[[Item], Result], item: Item) -> Result | Exception:
    """The result, or the exception; code that calls `sys.exit` has failed, and does not end the run."""
    try:
        return work(item)
    except Exception as error:
        return error
    except SystemExit as error:
        return RuntimeError(f"the code called sys.exit({error.code!r})").with_traceback(error.__traceback__)


def attempted(work: Callable[[Item], Any], item: Item) -> bytes:
    """The outcome as bytes. What cannot be sent back is an exception that says so.

    Plain pickle: the one of torch.multiprocessing would leave tensors in memory that vanishes with this process.
    """
    outcome = tried(work, item)
    if isinstance(outcome, Exception):
        return _error_bytes(outcome)
    try:
        return pickle.dumps((outcome, None))
    except Exception as error:
        return _error_bytes(error)


def outcome_of(content: bytes) -> Any:  # noqa: ANN401
    """What `attempted` wrote, in the process that asked for it."""
    outcome, text = pickle.loads(content)
    if text is not None:
        outcome.__cause__ = RemoteTraceback(text)
    return outcome


def _error_bytes(error: Exception) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        content = pickle.dumps((error, text))
        pickle.loads(content)
    except Exception:  # an exception class that cannot be made again from its arguments
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))
    return content
