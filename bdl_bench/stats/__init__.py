"""Intervals over seeds, paired comparisons of two methods on the same test rows, and comparisons over tasks.

A difference is called distinguishable when its 95 % interval leaves out zero. On one task that is a two-level bootstrap
of paired differences: seeds drawn with replacement, then rows within each. A metric that is a mean over rows is
resampled as its scores; any other is computed anew on each resample. Over tasks there are Wilcoxon's signed-rank test
and average ranks with Nemenyi's critical difference. Nothing is corrected for the number of comparisons but by `holm`.
"""

from bdl_bench.stats.bootstrap import (
    bootstrap_difference,
    bootstrap_replicates,
    bootstrap_statistic,
    replicate_difference,
)
from bdl_bench.stats.correction import holm
from bdl_bench.stats.intervals import (
    Direction,
    Interval,
    Verdict,
    best_group,
    mean_interval,
    paired_interval,
    verdict,
)
from bdl_bench.stats.ranks import Ranking, SignedRank, critical_difference, rank_methods, signed_rank

__all__ = [
    "Direction",
    "Interval",
    "Ranking",
    "SignedRank",
    "Verdict",
    "best_group",
    "bootstrap_difference",
    "bootstrap_replicates",
    "bootstrap_statistic",
    "critical_difference",
    "holm",
    "mean_interval",
    "paired_interval",
    "rank_methods",
    "replicate_difference",
    "signed_rank",
    "verdict",
]
