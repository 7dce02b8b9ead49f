"""One step of a grid, wherever an executor has put it: a value, which the process of the grid writes."""

from __future__ import annotations

from typing import TypeAlias

from bdl_bench.runner.evaluate_job import EvaluationJob, Measured, measure
from bdl_bench.runner.train_job import Trained, TrainingJob, prepare

__all__ = ["Item", "work"]

Item: TypeAlias = TrainingJob | EvaluationJob


def work(item: Item) -> Trained | Measured:
    """Train a network, or measure a method on it."""
    import bdl_bench.runner.warm_up  # noqa: F401  where work is done, and only there

    return prepare(item) if isinstance(item, TrainingJob) else measure(item)
