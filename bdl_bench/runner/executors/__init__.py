"""Executors run jobs in this process, in several processes of this machine, or on a Ray cluster."""

from bdl_bench.runner.executors.base import ONE_WORKER, Content, Executor, JobQueue, Outcome, Workers
from bdl_bench.runner.executors.choice import EXECUTORS, check_workers, executor_for
from bdl_bench.runner.executors.worker_errors import TimeLimitError, WorkerCrashedError

__all__ = [
    "EXECUTORS",
    "ONE_WORKER",
    "Content",
    "Executor",
    "JobQueue",
    "Outcome",
    "TimeLimitError",
    "WorkerCrashedError",
    "Workers",
    "check_workers",
    "executor_for",
]
