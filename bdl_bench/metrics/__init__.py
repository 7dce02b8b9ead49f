"""Metrics as pure functions of arrays, and the tables of metrics by kind of likelihood and set of rows."""

from bdl_bench.metrics.agreement import Agreement, WorstPoints, agreement, worst_points
from bdl_bench.metrics.evaluation import evaluate, metrics_of
from bdl_bench.metrics.groups import Parts, flattened, parts, tuned
from bdl_bench.metrics.metric import Arrays, Metric
from bdl_bench.metrics.per_example import class_arrays
from bdl_bench.metrics.table import LEVELS, METRICS

__all__ = [
    "LEVELS",
    "METRICS",
    "Agreement",
    "Arrays",
    "Metric",
    "Parts",
    "WorstPoints",
    "agreement",
    "class_arrays",
    "evaluate",
    "flattened",
    "metrics_of",
    "parts",
    "tuned",
    "worst_points",
]
