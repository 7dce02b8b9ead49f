"""What changed from one snapshot to another: the same seeds give the same data, so that each difference is a change."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Literal

from bdl_bench.metrics import METRICS
from benchmarks.nightly.snapshot import LIKELIHOODS, MethodResult, Snapshot

__all__ = ["Change", "changes"]

Scores = dict[str, dict[str, float]]
"""Value by metric and seed."""
Verdict = Literal["same", "better", "worse", "new", "missing"]
_METRICS = {metric.key: metric for metrics in METRICS.values() for metric in metrics}


@dataclass(frozen=True)
class Change:
    """The change of one method on one task.

    Args:
        task: name of the task.
        method: name of the method.
        verdict: by the negative log-likelihood, tuned, mean over the common seeds: "same" if it differs by less than
            the smallest relevant difference; "missing" without a result at a seed that the earlier snapshot has and
            other methods of the later one, too; "worse" if a value is not finite; "new" without an earlier value.
        mean: of the later value minus the earlier one; None if they were not compared.
        largest: absolute difference of a seed; None if they were not compared.
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
        _change(
            task,
            method,
            _likelihoods(earlier.tasks.get(task, {}).get(method)),
            _likelihoods(later.tasks.get(task, {}).get(method)),
            _seeds(later, task),
        )
        for task, method in dict.fromkeys(pairs)
    ]


def _change(task: str, method: str, before: Scores, after: Scores, seeds: set[str]) -> Change:
    """Return the change at the seeds that were run."""
    key = next((key for key in LIKELIHOODS if key in before or key in after), LIKELIHOODS[0])
    values = after.get(key, {})
    known = {seed: v for seed, v in before.get(key, {}).items() if isfinite(v) and seed in seeds}
    if not values or not known.keys() <= values.keys():
        return Change(task, method, "missing")
    if not all(map(isfinite, values.values())):
        return Change(task, method, "worse")
    if not known:
        return Change(task, method, "new")
    differences = [values[seed] - known[seed] for seed in known]
    mean, largest = fmean(differences), max(map(abs, differences))
    if abs(mean) < _METRICS[key].smallest_relevant(fmean(known.values())):
        return Change(task, method, "same", mean, largest)
    return Change(task, method, "worse" if mean > 0 else "better", mean, largest)


def _seeds(snapshot: Snapshot, task: str) -> set[str]:
    """Return the seeds of a task at which some method has a result."""
    results = snapshot.tasks.get(task, {}).values()
    return {seed for result in results for values in result.scores.values() for seed in values}


def _likelihoods(result: MethodResult | None) -> Scores:
    return {} if result is None else {key: result.scores[key] for key in LIKELIHOODS if key in result.scores}
