"""The jobs of a grid. Executing one returns a value; only the process of the grid writes files."""

from __future__ import annotations

from typing import TypeAlias

from bdl_bench.runner.evaluate_job import EvaluationJob, EvaluationResult, evaluate_job
from bdl_bench.runner.train_job import TrainingJob, TrainingResult, train_network

__all__ = ["Job", "execute"]

Job: TypeAlias = TrainingJob | EvaluationJob


def execute(job: Job) -> TrainingResult | EvaluationResult:
    """Train a network, or evaluate a method on it."""
    import bdl_bench.runner.warm_up  # noqa: F401  only in processes that execute jobs

    return train_network(job) if isinstance(job, TrainingJob) else evaluate_job(job)
