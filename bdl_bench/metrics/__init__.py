"""Metrics as pure functions of arrays; `table` binds them to the kinds of likelihood."""

from bdl_bench.metrics.agreement import Agreement, agreement
from bdl_bench.metrics.table import LEVELS, METRICS, Arrays, Metric, class_arrays, evaluate

__all__ = ["LEVELS", "METRICS", "Agreement", "Arrays", "Metric", "agreement", "class_arrays", "evaluate"]
