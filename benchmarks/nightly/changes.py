"""What changed from one snapshot to another: the same seeds give the same data, so that each difference is a change."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from bdl_bench.metrics import METRICS
from benchmarks.nightly.snapshot import KEYS, MethodResult, Snapshot

__all__ = ["Change", "changes"]

Verdict = Literal["same", "better", "worse", "new", "missing"]
_METRICS = {metric.key: metric for metrics in METRICS.values() for metric in metrics}


@dataclass(frozen=True)
class Change:
    """The change of one method on one task.

    Args:
        task: name of the task.
        method: name of the method.
        verdict: by the negative log-likelihood, tuned, mean over the common seeds: "same" if it differs by less than
            the smallest relevant difference; "new" or "missing" if one of the snapshots has no common seed.
        mean: of the later value minus the earlier one; None without a common seed.
        largest: absolute difference of a seed; None without a common seed.
    """

    task: str
    method: str
    verdict: Verdict
    mean: float | None = None
    largest: float | None = None


def changes(earlier: Snapshot, later: Snapshot) -> list[Change]:
    """Return the change of every method of either snapshot, in the order of the later one.

    Args:
        earlier: of the former version.
        later: of the new version.

    Returns:
        The changes by task and method.
    """
    pairs = [
        (task, method) for snapshot in (later, earlier) for task, found in snapshot.tasks.items() for method in found
    ]
    return [
        _change(task, method, earlier.tasks.get(task, {}).get(method), later.tasks.get(task, {}).get(method))
        for task, method in dict.fromkeys(pairs)
    ]


def _change(task: str, method: str, earlier: MethodResult | None, later: MethodResult | None) -> Change:
    if later is None:
        return Change(task, method, "missing")
    if earlier is None:
        return Change(task, method, "new")
    key = next(key for key in KEYS if key in later.scores)
    before, after = earlier.scores.get(key, {}), later.scores[key]
    differences = [after[seed] - before[seed] for seed in after if seed in before]
    if not differences:
        return Change(task, method, "new")
    mean = fmean(differences)
    metric = _METRICS[key]
    if abs(mean) < metric.smallest_relevant(fmean(before.values())):
        verdict: Verdict = "same"
    else:
        verdict = "worse" if (mean > 0) == (metric.better == "lower") else "better"
    return Change(task, method, verdict, mean, max(map(abs, differences)))
