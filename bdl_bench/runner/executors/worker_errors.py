"""Why a worker process is gone, in words: its time was up, or the signal, and whether memory may have been short."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from estimators.errors import EstimatorError

__all__ = ["TimeLimitError", "WorkerDiedError", "death_of", "machine_bytes"]

_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class WorkerDiedError(EstimatorError, RuntimeError):
    """The process that an item ran in ended before the item did: killed, crashed, or left by `os._exit`."""


class TimeLimitError(EstimatorError, TimeoutError):
    """An item took longer than the `seconds` that it was allowed, and was ended; or `other`, one like it, did."""

    def __init__(self, seconds: float, other: str | None = None) -> None:
        super().__init__(
            f"a cell that ends within the timeout of {seconds:g} s",
            received="one that was still at work then" if other is None else f"not tried, since {other} did not",
            remedy="a larger --timeout, or more --threads.",
        )
        self.seconds = seconds


def death_of(exit_code: int | None) -> WorkerDiedError:
    """The error for an exit code as `multiprocessing` gives it: −N is signal N; None where nobody knows."""
    return WorkerDiedError(
        "a worker process that lives until its item is done",
        received=f"one that {_in_words(exit_code)}, as one before; the second try had nothing running beside it",
        remedy="a method that needs less memory, a smaller problem, or more threads and fewer --jobs."
        if exit_code == -signal.SIGKILL
        else "the same cell with --executor in-process under `python -X faulthandler`, which shows where it ends.",
    )


def _in_words(exit_code: int | None) -> str:
    if exit_code is None:
        return "was lost"
    if exit_code >= 0:
        return f"ended with exit status {exit_code}"
    if -exit_code == signal.SIGKILL:
        size = f"{machine_bytes() / 2**30:.1f} GiB"
        return f"was killed by {_name(-exit_code)}, probably out of memory (this machine has {size})"
    return f"was ended by {_name(-exit_code)}"


def _name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def machine_bytes() -> int:
    """The memory of the machine, or of the container where that is less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no container, or "max"
            sizes.append(int(path.read_text()))
    return min(sizes)
