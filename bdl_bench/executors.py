"""Where work runs: in this process, or in several of this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import TypeAlias, TypeVar

import torch

from estimators.errors import OptionError, UnsupportedError

__all__ = ["Outcome", "check_executor", "run_all"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Outcome: TypeAlias = Result | Exception


def check_executor(name: str) -> None:
    """Raise unless the executor exists."""
    if name == "ray":
        raise UnsupportedError(
            'executor "local"', received='"ray", which is not there yet', remedy="--executor local with --jobs N."
        )
    if name != "local":
        raise OptionError('executor "local"', received=repr(name), remedy="leave --executor out.")


def run_all(
    work: Callable[[Item], Result], items: Sequence[Item], *, jobs: int, started: Callable[[Item], None]
) -> Iterator[tuple[Item, Outcome[Result]]]:
    """Each item with its result, or with the exception that it raised, as they come; `started` is told beforehand.

    With one job everything happens here, in order; with more, in fresh processes that share the cores between them.
    """
    return _serial(work, items, started) if jobs == 1 else _pooled(work, items, jobs, started)


def _serial(
    work: Callable[[Item], Result], items: Sequence[Item], started: Callable[[Item], None]
) -> Iterator[tuple[Item, Outcome[Result]]]:
    for item in items:
        started(item)
        try:
            outcome: Outcome[Result] = work(item)
        except Exception as error:
            outcome = error
        yield item, outcome


def _pooled(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int, started: Callable[[Item], None]
) -> Iterator[tuple[Item, Outcome[Result]]]:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures: dict[Future[Result], Item] = {pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                started(futures[future])
                error = future.exception()
                yield futures[future], error if isinstance(error, Exception) else future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
