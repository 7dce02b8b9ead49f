"""Why a worker process ended, in words: its timeout, or the signal and whether memory may have been short."""

from __future__ import annotations

import signal

from estimators.errors import EstimatorError
from estimators.runtime.memory import machine_bytes
from estimators.runtime.units import in_bytes

__all__ = ["TimeLimitError", "WorkerCrashedError", "worker_crashed"]


class WorkerCrashedError(EstimatorError, RuntimeError):
    """The process of a job ended before the job did: it was killed, crashed, or called `os._exit`."""


class TimeLimitError(EstimatorError, TimeoutError):
    """A job ran longer than its timeout and was ended, or was not tried because another seed of it was ended.

    Args:
        seconds: the timeout.
        other: the job that reached the timeout, for instance "seed 0", if this one was not tried.
    """

    def __init__(self, seconds: float, other: str | None = None) -> None:
        super().__init__(
            f"a run that ends within the timeout of {seconds:g} s",
            received="one that was still running then" if other is None else f"not tried, since {other} did not",
            remedy="a larger --timeout, or more --threads.",
        )
        self.seconds = seconds


def worker_crashed(exit_code: int | None) -> WorkerCrashedError:
    """Return the error for a job whose process crashed twice; exit code −N is signal N, None is unknown."""
    return WorkerCrashedError(
        "a worker process that lives until its job is done",
        received=f"one that {_in_words(exit_code)}, as one before; the second try ran alone",
        remedy="a method that needs less memory, a smaller problem, or more threads and fewer --jobs."
        if exit_code == -signal.SIGKILL
        else "the same run with --executor in-process under `python -X faulthandler`, which shows where it ends.",
    )


def _in_words(exit_code: int | None) -> str:
    if exit_code is None:
        return "was lost"
    if exit_code >= 0:
        return f"ended with exit status {exit_code}"
    if -exit_code == signal.SIGKILL:
        memory = in_bytes(machine_bytes())
        return f"was killed by {_name(-exit_code)}, probably out of memory (this machine has {memory})"
    return f"was ended by {_name(-exit_code)}"


def _name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
