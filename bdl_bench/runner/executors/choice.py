"""The executors by name."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

from bdl_bench.runner.executors.base import Executor, Workers
from bdl_bench.runner.executors.in_process import InProcess
from bdl_bench.runner.executors.local import Local
from bdl_bench.runner.executors.ray import Ray
from estimators.errors import OptionError, UnsupportedError

__all__ = ["EXECUTORS", "check_workers", "executor_for"]

EXECUTORS: dict[str, Callable[[Workers, str], Executor]] = {
    "in-process": lambda workers, _: InProcess(workers),
    "local": lambda workers, _: Local(workers),
    "ray": Ray,
}


def executor_for(workers: Workers, *, device: str = "cpu") -> Executor:
    """Create the executor of some workers.

    Args:
        workers: the options of the executor.
        device: where a job computes; ray reserves it.

    Returns:
        An executor, not yet entered.

    Raises:
        OptionError: as `check_workers`.
        UnsupportedError: ray is not installed.
    """
    check_workers(workers)
    return EXECUTORS[workers.name](workers, device)


def check_workers(workers: Workers) -> None:
    """Check the options of an executor.

    Args:
        workers: the options.

    Raises:
        OptionError: an unknown name, or a number that is not possible.
        UnsupportedError: ray is not installed.
    """
    name, jobs, timeout = workers.name, workers.jobs, workers.timeout
    if name not in EXECUTORS:
        raise OptionError(f"an executor among {', '.join(EXECUTORS)}", received=repr(name), remedy="omit it.")
    if workers.threads < 1 or (jobs is not None and jobs < 1):
        raise OptionError("jobs and threads >= 1", received=str(workers), remedy="omit --jobs for one.")
    if timeout is not None and not 0 < timeout < math.inf:
        raise OptionError(
            "a timeout of seconds above 0", received=f"{timeout:g}", remedy="leave --timeout out for none."
        )
    if name == "in-process" and jobs not in (None, 1):
        raise OptionError("one job with executor in-process", received=f"{jobs}", remedy="--executor local.")
    if name == "in-process" and timeout is not None:
        raise OptionError(
            "an executor that can end a run", received="a timeout with executor in-process", remedy="--executor local."
        )
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise UnsupportedError(
            "ray, which executor ray needs",
            received="an installation without it",
            remedy='pip install "bdl-bench[ray]", or --executor local.',
        )
