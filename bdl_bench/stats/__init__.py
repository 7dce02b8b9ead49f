"""Statistics of comparisons: intervals of differences, ranks over tasks, correction for the number of comparisons."""

from bdl_bench.stats.bootstrap import bootstrap_differences
from bdl_bench.stats.intervals import (
    Direction,
    Interval,
    Verdict,
    holm,
    mean_interval,
    not_significantly_worse,
    paired_interval,
    verdicts,
)
from bdl_bench.stats.ranks import Ranking, critical_difference, rank_methods

__all__ = [
    "Direction",
    "Interval",
    "Ranking",
    "Verdict",
    "bootstrap_differences",
    "critical_difference",
    "holm",
    "mean_interval",
    "not_significantly_worse",
    "paired_interval",
    "rank_methods",
    "verdicts",
]
