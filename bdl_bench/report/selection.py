"""What a report shows: all tasks, methods and columns of a directory, or some of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bdl_bench.metrics import Metric
from bdl_bench.records.record import Record
from bdl_bench.suggestions import did_you_mean
from estimators.errors import OptionError

__all__ = ["EVERYTHING", "Selection"]


@dataclass(frozen=True)
class Selection:
    """The tasks, methods and columns of a report.

    Args:
        tasks: names of tasks; None: all.
        methods: names of methods; None: all. Comparisons with the baseline need the baseline.
        metrics: columns by label or key, such as "NLL" or "cal/ECE"; None: all. The first column that a task has is the
            one that the summary compares.

    Example:
        >>> Selection(tasks=("wine",), metrics=("NLL", "ECE")).methods is None
        True
    """

    tasks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    metrics: tuple[str, ...] | None = None

    def of_records(self, records: Sequence[Record]) -> list[Record]:
        """Return the records of the selected tasks and methods.

        Args:
            records: all records of a directory.

        Returns:
            Some of them, in the same order.

        Raises:
            OptionError: for an option without names, a task or a method that no record has, and if no record is left.
        """
        for kind, names in (("tasks", self.tasks), ("methods", self.methods), ("metrics", self.metrics)):
            _check_not_empty(kind, names)
        _check("tasks", self.tasks, {r.task for r in records})
        _check("methods", self.methods, {r.method for r in records})
        found = [r for r in records if _includes(self.tasks, r.task) and _includes(self.methods, r.method)]
        if records and not found:
            raise OptionError(
                "tasks and methods that some record has together",
                received=f"tasks {', '.join(self.tasks or ('all',))}; methods {', '.join(self.methods or ('all',))}",
                remedy="leave one of the options out.",
            )
        return found

    def of_metrics(self, metrics: Sequence[Metric]) -> tuple[Metric, ...]:
        """Return the selected columns of a task, in the order in which they are named.

        Args:
            metrics: all columns of a task.

        Returns:
            Some of them; the first column of the task if it has none of the selected ones.
        """
        if self.metrics is None:
            return tuple(metrics)
        found = [m for name in self.metrics for m in metrics if name.lower() in _names(m)]
        return tuple(dict.fromkeys(found)) or tuple(metrics[:1])

    def check_metrics(self, metrics: Iterable[Metric]) -> None:
        """Raise OptionError for a column that no task has.

        Args:
            metrics: the columns of all selected tasks.
        """
        columns = list(metrics)
        known = {name for metric in columns for name in _names(metric)}
        for name in self.metrics or ():
            if name.lower() not in known:
                labels = sorted({text for metric in columns for text in (metric.label, metric.key)})
                _raise("columns", name, labels)


EVERYTHING = Selection()
"""All tasks, methods and columns."""


def _names(metric: Metric) -> tuple[str, ...]:
    return metric.label.lower(), metric.key.lower()


def _includes(names: Sequence[str] | None, name: str) -> bool:
    return names is None or name in names


def _check_not_empty(kind: str, names: Sequence[str] | None) -> None:
    if names is not None and not names:
        raise OptionError(f"{kind} by name", received="no name", remedy="leave the option out to show all.")


def _check(kind: str, wanted: Sequence[str] | None, known: set[str]) -> None:
    for name in wanted or ():
        if name not in known:
            _raise(kind, name, sorted(known))


def _raise(kind: str, name: str, known: list[str]) -> None:
    shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
    raise OptionError(
        f"{kind} that the records have: {shown}",
        received=repr(name),
        remedy=did_you_mean(name, known, "leave the option out to show all."),
    )
