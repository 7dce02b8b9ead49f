"""Which methods differ from the baseline on which task: a mean over tasks may hide both."""

from __future__ import annotations

from collections.abc import Sequence

from bdl_bench.methods import BASELINE
from bdl_bench.report.formatting import join_names
from bdl_bench.report.overall import TaskScores
from bdl_bench.report.recommendation import Answer
from bdl_bench.stats import Verdict

__all__ = ["on_single_tasks"]

_MOST_METHODS = 3
"""Methods that are named for one task."""


def on_single_tasks(tasks: Sequence[TaskScores]) -> Answer | None:
    """Return which methods are significantly better or worse than the baseline on single tasks, by its first metric.

    Args:
        tasks: all tasks of the report.

    Returns:
        The answer; None for fewer than two tasks, or if no method could be tested against the baseline.
    """
    tested = [any(verdict not in {None, "unknown"} for verdict in _verdicts(t).values()) for t in tasks]
    if len(tasks) < 2 or not any(tested):
        return None
    found = {word: [text for t in tasks if (text := _named(t, word))] for word in ("better", "worse")}
    sentences = [f"Significantly {word} than {BASELINE}: {'; '.join(texts)}." for word, texts in found.items() if texts]
    none = f"No significant difference from {BASELINE}{'' if all(tested) else ' on those that were tested'}."
    return Answer("On single tasks", " ".join(sentences) or none)


def _verdicts(task: TaskScores) -> dict[str, Verdict | None]:
    """Return the verdicts on the first metric of a task by method."""
    entries, key = task.scores.compared.entries, task.scores.first.key
    return {method: entry[key].against_baseline for method, entry in entries.items() if key in entry}


def _named(task: TaskScores, verdict: str) -> str:
    """Return the methods with this verdict and their task, the best one first; empty without one."""
    entries, metric = task.scores.compared.entries, task.scores.first
    sign = -1 if metric.better == "higher" else 1
    methods = [method for method, found in _verdicts(task).items() if found == verdict]
    methods.sort(key=lambda method: sign * entries[method][metric.key].interval.mean)
    return f"{join_names(methods, most=_MOST_METHODS)} on {task.name}" if methods else ""
