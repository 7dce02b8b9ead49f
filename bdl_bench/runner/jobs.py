"""One step of a grid, wherever an executor has put it: a value, which the process of the grid writes."""

from __future__ import annotations

from typing import TypeAlias

from bdl_bench.runner.evaluate_job import EvaluationJob, EvaluationResult, evaluate_job
from bdl_bench.runner.train_job import TrainingJob, TrainingResult, train_network

__all__ = ["Job", "execute"]

Job: TypeAlias = TrainingJob | EvaluationJob


def execute(item: Job) -> TrainingResult | EvaluationResult:
    """Train a network, or measure a method on it."""
    import bdl_bench.runner.warm_up  # noqa: F401  where work is done, and only there

    return train_network(item) if isinstance(item, TrainingJob) else evaluate_job(item)
