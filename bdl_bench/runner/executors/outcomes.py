"""Run one job and turn its outcome, a result or an exception with its traceback, into bytes for another process."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["RemoteTraceback", "outcome_from_bytes", "run_job", "run_job_to_bytes"]

Job = TypeVar("Job")
Result = TypeVar("Result")


class RemoteTraceback(Exception):
    """The traceback, as text, of an exception from another process; set as that exception's cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def run_job(work: Callable[[Job], Result], job: Job) -> Result | Exception:
    """Return the result of a job, or the exception that it raised; `sys.exit` in a job is a RuntimeError."""
    try:
        return work(job)
    except Exception as error:
        return error
    except SystemExit as error:
        return RuntimeError(f"the code called sys.exit({error.code!r})").with_traceback(error.__traceback__)


def run_job_to_bytes(work: Callable[[Job], Any], job: Job) -> bytes:
    """Return the outcome of a job as bytes; if the result cannot be pickled, the outcome is that exception.

    Plain pickle copies tensors. The pickle of torch.multiprocessing would put them into shared memory, which is lost
    when this process ends.
    """
    outcome = run_job(work, job)
    if isinstance(outcome, Exception):
        return _error_bytes(outcome)
    try:
        return pickle.dumps((outcome, None))
    except Exception as error:
        return _error_bytes(error)


def outcome_from_bytes(content: bytes) -> Any:  # noqa: ANN401
    """Return the outcome that `run_job_to_bytes` wrote."""
    outcome, text = pickle.loads(content)
    if text is not None:
        outcome.__cause__ = RemoteTraceback(text)
    return outcome


def _error_bytes(error: Exception) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        content = pickle.dumps((error, text))
        pickle.loads(content)
    except Exception:  # an exception class that cannot be created again from its arguments
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))
    return content
