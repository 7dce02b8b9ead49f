"""Statistics of comparisons: intervals over seeds and rows, tests of differences, ties, ranks over tasks."""

from bdl_bench.stats.comparisons import Comparisons, compare_methods, distinct_seeds, negated, seed_groups
from bdl_bench.stats.intervals import (
    FEWEST_SEEDS,
    Direction,
    Interval,
    Verdict,
    detectable_difference,
    holm,
    mean_interval,
    not_significantly_worse,
    verdicts,
)
from bdl_bench.stats.over_seeds import intervals_over_seeds, paired_intervals
from bdl_bench.stats.over_tasks import mean_over_tasks
from bdl_bench.stats.ranks import FEWEST_TASKS, Ranking, critical_difference, rank_methods
from bdl_bench.stats.ties import TIE_TOLERANCE, is_tie, merge_ties

__all__ = [
    "FEWEST_SEEDS",
    "FEWEST_TASKS",
    "TIE_TOLERANCE",
    "Comparisons",
    "Direction",
    "Interval",
    "Ranking",
    "Verdict",
    "compare_methods",
    "critical_difference",
    "detectable_difference",
    "distinct_seeds",
    "holm",
    "intervals_over_seeds",
    "is_tie",
    "mean_interval",
    "mean_over_tasks",
    "merge_ties",
    "negated",
    "not_significantly_worse",
    "paired_intervals",
    "rank_methods",
    "seed_groups",
    "verdicts",
]
