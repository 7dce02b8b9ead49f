"""The machines of a Ray cluster (the `ray` extra). They need no common disk, since jobs and results are sent."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch

from bdl_bench.runner.executors.base import POLL_SECONDS, Content, Executor, JobQueue, Outcomes, Workers
from bdl_bench.runner.executors.outcomes import outcome_from_bytes, run_job_to_bytes
from bdl_bench.runner.executors.worker_errors import TimeLimitError, WorkerCrashedError
from estimators.errors import OptionError

__all__ = ["Ray"]

Job = TypeVar("Job")
Result = TypeVar("Result")
_RETRIES = 2
"""How often Ray repeats a task whose process or machine was lost."""


class Ray(Executor):
    """Runs each job as a Ray task, which reserves `threads` processors, and a GPU if the device is cuda.

    It joins the cluster that RAY_ADDRESS names, or the one on this machine. If there is none, it starts one and ends
    it at exit. Both packages, and your own modules, must be importable on every machine: installed, in a folder that
    all machines have, or sent there by `ray job submit --working-dir`.
    """

    def __init__(self, workers: Workers, device: str = "cpu") -> None:
        self.workers, self.device = workers, torch.device(device)
        self.started_cluster = False

    def __enter__(self) -> Self:
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
            self.started_cluster = True
        try:
            self._check_capacity(ray.nodes())
        except OptionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self.started_cluster:
            ray.shutdown()

    def share(self, path: Path) -> Content:
        """Put the content into the object store of the cluster, which sends it to each machine once."""
        import ray

        return _Stored(ray.put(path.read_bytes()))

    def run(self, work: Callable[[Job], Result], queue: JobQueue[Job]) -> Outcomes[Job, Result]:
        import ray

        tasks = _Tasks(self._submitter(work), self._capacity, queue)
        try:
            while tasks.submit():
                for reference, job in tasks.done():
                    yield job, _outcome(reference)
                for reference, job, seconds in tasks.timed_out():
                    ray.cancel(reference, force=True)
                    yield job, TimeLimitError(seconds)
        finally:
            for reference in tasks.running:
                ray.cancel(reference, force=True)

    def _submitter(self, work: Callable[[Job], Any]) -> Callable[[Job], Any]:
        import ray

        n_threads, n_gpus = self.workers.threads, int(self.device.type == "cuda")
        task = ray.remote(num_cpus=n_threads, num_gpus=n_gpus, max_retries=_RETRIES)(_task)
        content, environment = pickle.dumps(work), _Environment.current()
        return lambda job: task.remote(job, content, n_threads, environment)

    def _check_capacity(self, nodes: list[dict[str, Any]]) -> None:
        """Raise OptionError if no machine could take a task, since Ray would wait for one for ever."""
        wanted = {"CPU": self.workers.threads, "GPU": int(self.device.type == "cuda")}
        free = [node["Resources"] for node in nodes if node["Alive"]]
        if not any(all(resources.get(name, 0) >= n for name, n in wanted.items()) for resources in free):
            raise OptionError(
                f"a machine of the cluster with {wanted['CPU']} processors and {wanted['GPU']} GPUs",
                received=str([{name: resources.get(name, 0) for name in wanted} for resources in free]),
                remedy="fewer --threads, or --device cpu.",
            )

    def _capacity(self) -> int:
        """Return how many jobs may run: as many as the current machines have room for, and at most `jobs`."""
        import ray

        here = ray.cluster_resources()
        n_tasks = here.get("CPU", 0) // self.workers.threads
        if self.device.type == "cuda":
            n_tasks = min(n_tasks, here.get("GPU", 0))
        return max(1, min(int(n_tasks), self.workers.jobs or int(n_tasks)))


class _Tasks(Generic[Job]):
    """The tasks that are running, each with its job."""

    def __init__(self, submit: Callable[[Job], Any], capacity: Callable[[], int], queue: JobQueue[Job]) -> None:
        self.submit_one, self.capacity, self.queue = submit, capacity, queue
        self.running: dict[Any, Job] = {}
        self.starts: dict[Any, float] = {}

    def submit(self) -> bool:
        """Submit jobs while there is room; return False if no job is left."""
        queue = self.queue
        while not queue.exhausted and len(self.running) < self.capacity() and (job := queue.take()) is not None:
            queue.started(job)
            reference = self.submit_one(job)
            self.running[reference], self.starts[reference] = job, time.monotonic()
        return bool(self.running) or not queue.exhausted

    def done(self) -> list[tuple[Any, Job]]:
        """Return the tasks that have ended; if others could start or time out, after `POLL_SECONDS` at most."""
        import ray

        if not self.running:
            time.sleep(POLL_SECONDS)
            return []
        must_look = not self.queue.exhausted or any(
            self.queue.timeout(job) is not None for job in self.running.values()
        )
        ended, _ = ray.wait(list(self.running), timeout=POLL_SECONDS if must_look else None)
        return [(reference, self.running.pop(reference)) for reference in ended]

    def timed_out(self) -> list[tuple[Any, Job, float]]:
        """Return the tasks that have reached their timeout since they were submitted, with its seconds."""
        limits = ((reference, job, self.queue.timeout(job)) for reference, job in self.running.items())
        found = [(r, job, s) for r, job, s in limits if s is not None and time.monotonic() >= self.starts[r] + s]
        for reference, _, _ in found:
            del self.running[reference]
        return found


@dataclass(frozen=True)
class _Environment:
    """The paths of modules of the process that submits, and its BDL_BENCH variables."""

    paths: list[str]
    variables: dict[str, str]

    @classmethod
    def current(cls) -> _Environment:
        variables = {name: value for name, value in os.environ.items() if name.startswith("BDL_BENCH_")}
        return cls([path or str(Path.cwd()) for path in sys.path], variables)

    def apply(self) -> None:
        """Add the paths that this machine has, and set the variables."""
        sys.path.extend(path for path in self.paths if path not in sys.path and Path(path).exists())
        os.environ.update(self.variables)


def _task(job: object, content: bytes, threads: int, environment: _Environment) -> bytes:
    """Run a job; it is an argument of its own, since Ray finds references to its store only in arguments."""
    environment.apply()
    torch.set_num_threads(threads)
    return run_job_to_bytes(pickle.loads(content), job)


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
