"""The machines of a Ray cluster (the `ray` extra). They need no common disk: items, results and weights are values."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch

from bdl_bench.runner.executors.base import POLL_SECONDS, Content, Executor, JobTimeout, Outcome, Workers, no_timeout
from bdl_bench.runner.executors.outcomes import outcome_from_bytes, run_job_to_bytes
from bdl_bench.runner.executors.worker_errors import TimeLimitError, WorkerCrashedError
from estimators.errors import OptionError

__all__ = ["Ray"]

Job = TypeVar("Job")
Result = TypeVar("Result")
_RETRIES = 2
"""How often a task is run again whose process or machine was lost."""


class Ray(Executor):
    """One Ray task an item. It reserves `threads` processors, and a GPU where the device is cuda.

    Joins the cluster that RAY_ADDRESS names, or the one that runs on this machine; where there is none, starts one
    and ends it in the end. Both packages, and a module of one's own, must be importable on every machine: installed,
    in a folder that all of them have, or sent there by `ray job submit --working-dir`.
    """

    def __init__(self, workers: Workers, device: str = "cpu") -> None:
        self.workers, self.device = workers, torch.device(device)
        self.is_ours = False

    def __enter__(self) -> Self:
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
            self.is_ours = True
        try:
            self._check_room(ray.nodes())
        except OptionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self.is_ours:
            ray.shutdown()

    def share(self, path: Path) -> Content:
        """The content in the object store of the cluster, sent to each machine once."""
        import ray

        return _Stored(ray.put(path.read_bytes()))

    def run(
        self,
        work: Callable[[Job], Result],
        items: Iterator[Job | None],
        *,
        started: Callable[[Job], None],
        timeout: JobTimeout[Job] = no_timeout,
    ) -> Generator[tuple[Job, Outcome[Result]], None, None]:
        import ray

        tasks = _Tasks(self._submitter(work), self._room, items, started, timeout)
        try:
            while tasks.submit():
                for reference, item in tasks.done():
                    yield item, _outcome(reference)
                for reference, item, seconds in tasks.overdue():
                    ray.cancel(reference, force=True)
                    yield item, TimeLimitError(seconds)
        finally:
            for reference in tasks.running:
                ray.cancel(reference, force=True)

    def _submitter(self, work: Callable[[Job], Any]) -> Callable[[Job], Any]:
        import ray

        n_threads, n_gpus = self.workers.threads, int(self.device.type == "cuda")
        task = ray.remote(num_cpus=n_threads, num_gpus=n_gpus, max_retries=_RETRIES)(_task)
        content, surroundings = pickle.dumps(work), _Surroundings.here()
        return lambda item: task.remote(item, content, n_threads, surroundings)

    def _check_room(self, nodes: list[dict[str, Any]]) -> None:
        """Ray waits for ever for a machine that could take a task; so it is refused before."""
        wanted = {"CPU": self.workers.threads, "GPU": int(self.device.type == "cuda")}
        free = [node["Resources"] for node in nodes if node["Alive"]]
        if not any(all(resources.get(name, 0) >= n for name, n in wanted.items()) for resources in free):
            raise OptionError(
                f"a machine of the cluster with {wanted['CPU']} processors and {wanted['GPU']} GPUs",
                received=str([{name: resources.get(name, 0) for name in wanted} for resources in free]),
                remedy="fewer --threads, or --device cpu.",
            )

    def _room(self) -> int:
        """How many items may be under way: what the machines of now can do at a time, and `jobs` at the most."""
        import ray

        here = ray.cluster_resources()
        places = here.get("CPU", 0) // self.workers.threads
        if self.device.type == "cuda":
            places = min(places, here.get("GPU", 0))
        return max(1, min(int(places), self.workers.jobs or int(places)))


class _Tasks(Generic[Job]):
    """The tasks that are under way, each with its item."""

    def __init__(
        self,
        submit: Callable[[Job], Any],
        room: Callable[[], int],
        items: Iterator[Job | None],
        started: Callable[[Job], None],
        timeout: JobTimeout[Job],
    ) -> None:
        self.submit_one, self.room, self.items, self.started, self.timeout = submit, room, items, started, timeout
        self.running: dict[Any, Job] = {}
        self.begun: dict[Any, float] = {}
        self.exhausted = False

    def submit(self) -> bool:
        """Fill the cluster; False when there is nothing left to do."""
        while not self.exhausted and len(self.running) < self.room():
            try:
                item = next(self.items)
            except StopIteration:
                self.exhausted = True
                break
            if item is None:
                break
            self.started(item)
            reference = self.submit_one(item)
            self.running[reference], self.begun[reference] = item, time.monotonic()
        return bool(self.running) or not self.exhausted

    def done(self) -> list[tuple[Any, Job]]:
        """What has ended, after a while at the most where an item may come free meanwhile."""
        import ray

        if not self.running:
            time.sleep(POLL_SECONDS)
            return []
        must_look = not self.exhausted or any(self.timeout(item) is not None for item in self.running.values())
        ended, _ = ray.wait(list(self.running), timeout=POLL_SECONDS if must_look else None)
        return [(reference, self.running.pop(reference)) for reference in ended]

    def overdue(self) -> list[tuple[Any, Job, float]]:
        """What has used up its time, from when it was handed to the cluster; the seconds that it had."""
        limits = ((reference, item, self.timeout(item)) for reference, item in self.running.items())
        found = [(r, item, s) for r, item, s in limits if s is not None and time.monotonic() >= self.begun[r] + s]
        for reference, _, _ in found:
            del self.running[reference]
        return found


@dataclass(frozen=True)
class _Surroundings:
    """Where the driver finds modules, and what it has set for the bench."""

    paths: list[str]
    variables: dict[str, str]

    @classmethod
    def here(cls) -> _Surroundings:
        ours = {name: value for name, value in os.environ.items() if name.startswith("BDL_BENCH_")}
        return cls([path or str(Path.cwd()) for path in sys.path], ours)

    def take_effect(self) -> None:
        """On a machine that has these folders."""
        sys.path.extend(path for path in self.paths if path not in sys.path and Path(path).exists())
        os.environ.update(self.variables)


def _task(item: object, content: bytes, threads: int, surroundings: _Surroundings) -> bytes:
    """The item comes as it is, since Ray follows references to its store only through arguments."""
    surroundings.take_effect()
    torch.set_num_threads(threads)
    return run_job_to_bytes(pickle.loads(content), item)


def _outcome(reference: Any) -> Any:  # noqa: ANN401
    import ray

    try:
        return outcome_from_bytes(ray.get(reference))
    except ray.exceptions.RayError as error:
        return WorkerCrashedError(
            "a task that ends on a machine of the cluster",
            received=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            remedy="fewer jobs at a time; both packages and your own module importable on every machine; "
            "the log of the machine says more.",
        )


@dataclass(frozen=True)
class _Stored:
    """Bytes in the object store of the cluster."""

    reference: Any

    def read_bytes(self) -> bytes:
        import ray

        content: bytes = ray.get(self.reference)
        return content
