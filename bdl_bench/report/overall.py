"""The comparison over all tasks by one metric: effects on its mean over tasks, with intervals and tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import isfinite
from typing import Protocol

from bdl_bench.methods import BASELINE
from bdl_bench.metrics import Metric
from bdl_bench.report.formatting import join_names
from bdl_bench.report.sections.scores import Scores
from bdl_bench.report.seed_design import SeedDesign
from bdl_bench.stats import Comparisons, Interval, mean_over_tasks, negated, verdicts

__all__ = ["Overall", "TaskScores", "overall"]


class TaskScores(Protocol):
    """A task with its scores."""

    @property
    def name(self) -> str: ...

    @property
    def scores(self) -> Scores: ...

    @property
    def design(self) -> SeedDesign: ...


@dataclass(frozen=True)
class Overall:
    """Methods that finished every seed of every task of a group, compared by their mean over these tasks.

    Args:
        tasks: names of the tasks whose first metric is this one.
        metric: the first metric of one of these tasks; the others have the same label and unit.
        tuned: whether every table is that of tuned predictions.
        means: mean over the tasks by method, best first.
        tests: of the means over the tasks, with the families of `Comparisons`.
        smallest_relevant: the smallest relevant difference of the mean over the tasks.
        n_seeds: smallest number of distinct seeds of a task.
        n_all_tasks: number of tasks of the report; others than `tasks` have other first metrics.
        has_copies: whether a task with that number has more seeds, of which some have identical predictions.
        left_out: methods without a mean over these tasks: they miss a task or seed, or a value is not finite.
        fewest_seeds: names of the tasks with `n_seeds` distinct seeds, if others have more.
        missing_tasks: names of the tasks on which a method of `left_out` misses a seed or has a value that is not
            finite, by method.
    """

    tasks: list[str]
    metric: Metric
    tuned: bool
    means: dict[str, float]
    tests: Comparisons
    smallest_relevant: float
    n_seeds: int
    n_all_tasks: int = 1
    has_copies: bool = False
    left_out: Sequence[str] = ()
    fewest_seeds: Sequence[str] = ()
    missing_tasks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The method with the best mean."""
        return next(iter(self.means))

    @property
    def baseline(self) -> str | None:
        """The baseline, if it was run on all of these tasks."""
        return BASELINE if BASELINE in self.means else None

    @property
    def scope(self) -> str:
        """What the means are over, such as "over 2 tasks", with their names if they are not all; empty for one task."""
        n = len(self.tasks)
        if n >= self.n_all_tasks:
            return f"over {n} tasks" if n > 1 else ""
        return f"over {n} tasks ({join_names(self.tasks)})" if n > 1 else f"on task {self.tasks[0]}"

    @property
    def unit(self) -> str:
        """The unit of a difference, for the end of a number."""
        return " nats" if "NLL" in self.metric.label else ""

    def without(self, method: str) -> Overall:
        """Return the comparison of the other methods; verdicts stay corrected for all methods.

        Args:
            method: name of a method, which may be missing.

        Returns:
            The comparison, whose best method and tests are those of the others.
        """
        tests = Comparisons(
            {m: verdict for m, verdict in self.tests.with_baseline.items() if m != method},
            {pair: verdict for pair, verdict in self.tests.pairs.items() if method not in pair},
            {m: found for m, found in self.tests.baseline_differences.items() if m != method},
            {pair: found for pair, found in self.tests.differences.items() if method not in pair},
        )
        means = {m: mean for m, mean in self.means.items() if m != method}
        return replace(self, means=means, tests=tests, left_out=[m for m in self.left_out if m != method])

    @property
    def not_worse_than_best(self) -> list[str]:
        """The best method and all others that no test finds to be worse, best first."""
        found = self.tests.with_method(self.best)
        return [m for m in self.means if m == self.best or found.get(m) != "worse"]


def overall(tasks: Sequence[TaskScores]) -> Overall | None:
    """Return the comparison over the largest group of tasks with a common first metric.

    Values in target units cannot be averaged over tasks; a group of more than one task has a metric without a unit,
    such as NLL in nats or accuracy.

    Args:
        tasks: all tasks of the report.

    Returns:
        The comparison; None for fewer than two methods that finished every seed of these tasks.
    """
    group = _group(tasks)
    if not group:
        return None
    methods = [m for m in group[0].scores.compared.entries if all(_mean(t, m) is not None for t in group)]
    differences = {pair: d for pair in combinations(methods, 2) if (d := _difference(group, *pair)) is not None}
    methods = [m for m in methods if all(pair in differences for pair in combinations(methods, 2) if m in pair)]
    metric, smallest = group[0].scores.first, _smallest_relevant(group)
    better = metric.better
    if len(methods) < 2 or better is None:
        return None
    sign = 1 if better == "lower" else -1
    means = {m: sum(_mean(t, m) or 0.0 for t in group) / len(group) for m in methods}
    against = {
        m: differences[m, BASELINE] if (m, BASELINE) in differences else negated(differences[BASELINE, m])
        for m in methods
        if m != BASELINE and BASELINE in methods
    }
    left_out = [m for m in _all_methods(tasks) if m not in means]
    n_seeds = min(t.design.n_distinct for t in group)
    fewest = [t.name for t in group if t.design.n_distinct == n_seeds]
    return Overall(
        [t.name for t in group],
        metric,
        all(t.scores.compared.tuned for t in group),
        dict(sorted(means.items(), key=lambda item: sign * item[1])),
        Comparisons(
            verdicts(against, better, smallest_relevant=smallest),
            verdicts(differences, better, smallest_relevant=smallest),
            against,
            differences,
        ),
        smallest,
        n_seeds,
        len(tasks),
        any(t.design.n_distinct == n_seeds < len(t.design.seeds) for t in group),
        left_out,
        fewest if len(fewest) < len(group) else [],
        {m: [t.name for t in group if _mean(t, m) is None] for m in left_out},
    )


def _all_methods(tasks: Sequence[TaskScores]) -> list[str]:
    return list(dict.fromkeys(m for t in tasks for m in t.scores.untuned.entries))


def _group(tasks: Sequence[TaskScores]) -> list[TaskScores]:
    """Return the tasks with the most common first metric without a unit; a single task has any metric."""
    if len(tasks) == 1:
        return list(tasks)
    known = [t for t in tasks if t.scores.first.relevant is not None and t.scores.first.better is not None]
    labels = Counter((t.scores.first.label, t.scores.first.better) for t in known)
    if not labels:
        return []
    chosen = labels.most_common(1)[0][0]
    return [t for t in known if (t.scores.first.label, t.scores.first.better) == chosen]


def _mean(task: TaskScores, method: str) -> float | None:
    """Return the first metric of a method that finished every seed of a task."""
    entry = task.scores.compared.entries.get(method, {}).get(task.scores.first.key)
    if entry is None or method in task.scores.incomplete or not isfinite(entry.interval.mean):
        return None
    return entry.interval.mean


def _difference(tasks: Sequence[TaskScores], method: str, other: str) -> Interval | None:
    found = []
    for task in tasks:
        tests = task.scores.compared.tests.get(task.scores.first.key)
        difference = None if tests is None else tests.difference(method, other)
        if difference is None:
            return None
        found.append(difference)
    return mean_over_tasks(found)


def _smallest_relevant(tasks: Sequence[TaskScores]) -> float:
    found = [t.scores.compared.relevant.get(t.scores.first.key, 0.0) for t in tasks]
    return sum(found) / len(found)
