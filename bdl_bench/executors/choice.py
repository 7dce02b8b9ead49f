"""The executors by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from bdl_bench.executors.base import Executor, Workers
from bdl_bench.executors.in_process import InProcess
from bdl_bench.executors.local import Local
from bdl_bench.executors.ray import Ray
from estimators.errors import OptionError, UnsupportedError

__all__ = ["EXECUTORS", "check_executor", "executor_for"]

EXECUTORS: dict[str, Callable[[Workers, str], Executor]] = {
    "in-process": lambda workers, _: InProcess(workers),
    "local": lambda workers, _: Local(workers),
    "ray": Ray,
}


def executor_for(workers: Workers, *, device: str = "cpu") -> Executor:
    """The executor of these workers; `device` is what a job computes on, since ray has to reserve it."""
    check_executor(workers.name, jobs=workers.jobs)
    return EXECUTORS[workers.name](workers, device)


def check_executor(name: str, *, jobs: int | None = None) -> None:
    """OptionError for a name that there is not or several jobs in one process, UnsupportedError for a missing ray."""
    if name not in EXECUTORS:
        raise OptionError(f"an executor among {', '.join(EXECUTORS)}", received=repr(name), remedy="leave it out.")
    if name == "in-process" and jobs not in (None, 1):
        raise OptionError("one job with executor in-process", received=f"{jobs}", remedy="--executor local.")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise UnsupportedError(
            "ray, which executor ray needs",
            received="an installation without it",
            remedy='pip install "bdl-bench[ray]", or --executor local.',
        )
