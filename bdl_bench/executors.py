"""Where work runs: in this process, or in several of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch

from estimators.errors import OptionError, UnsupportedError

__all__ = ["ONE_WORKER", "Outcome", "Workers", "check_executor", "run_all"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Outcome: TypeAlias = Result | Exception


@dataclass(frozen=True)
class Workers:
    """How many processes, and threads in each.

    One thread is as fast as many for small networks, and steady on a busy machine, where threads wait for each other.
    """

    jobs: int = 1
    threads: int = 1


ONE_WORKER = Workers()


def check_executor(name: str) -> None:
    """Raise unless the executor exists."""
    if name == "ray":
        raise UnsupportedError(
            'executor "local"', received='"ray", which is not there yet', remedy="--executor local with --jobs N."
        )
    if name != "local":
        raise OptionError('executor "local"', received=repr(name), remedy="leave --executor out.")


def run_all(
    work: Callable[[Item], Result], items: Sequence[Item], *, workers: Workers, started: Callable[[Item], None]
) -> Iterator[tuple[Item, Outcome[Result]]]:
    """Each item with its result, or with the exception that it raised, as they come; `started` is told beforehand.

    With one job everything happens here, in order; with more, in fresh processes.
    """
    return _serial(work, items, workers, started) if workers.jobs == 1 else _pooled(work, items, workers, started)


def _serial(
    work: Callable[[Item], Result], items: Sequence[Item], workers: Workers, started: Callable[[Item], None]
) -> Iterator[tuple[Item, Outcome[Result]]]:
    for item in items:
        started(item)
        before = torch.get_num_threads()
        torch.set_num_threads(workers.threads)
        try:
            outcome: Outcome[Result] = work(item)
        except Exception as error:
            outcome = error
        finally:
            torch.set_num_threads(before)
        yield item, outcome


def _pooled(
    work: Callable[[Item], Result], items: Sequence[Item], workers: Workers, started: Callable[[Item], None]
) -> Iterator[tuple[Item, Outcome[Result]]]:
    context, threads = multiprocessing.get_context("spawn"), (workers.threads,)
    with ProcessPoolExecutor(
        workers.jobs, mp_context=context, initializer=torch.set_num_threads, initargs=threads
    ) as pool:
        futures: dict[Future[Result], Item] = {pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                started(futures[future])
                error = future.exception()
                yield futures[future], error if isinstance(error, Exception) else future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
