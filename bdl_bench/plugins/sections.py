"""Sections of the report that plugins add: what they receive and what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["SECTIONS", "MakeSection", "Section", "SectionResults"]


class SectionResults(Protocol):
    """The finished runs of one task, as the function of a section receives them.

    Attributes:
        name: name of the task.
        kind: "regression", "classification" or "binary".
    """

    name: str
    kind: str

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order of tables."""

    @property
    def seeds(self) -> list[int]:
        """Seeds with a finished run."""

    @property
    def tuned_methods(self) -> list[str]:
        """Names of the methods of which every run was tuned."""

    def shared_seeds(self, method: str, other: str) -> list[int]:
        """Return the seeds that two methods finished.

        Args:
            method: name of a method.
            other: name of another method, or the same.

        Returns:
            The seeds.
        """

    def predictions(self, method: str, seed: int, *, tuned: bool = False) -> Mapping[str, NDArray[Any]]:
        """Return the arrays of a run.

        Args:
            method: name of a method.
            seed: a seed that it finished.
            tuned: whether of the tuned or of the untuned estimator.

        Returns:
            Arrays by name, in the layout of `bdl_bench.metrics.groups`.
        """

    def metric_values(self, method: str, seed: int, *, tuned: bool = False) -> dict[str, float]:
        """Return the metrics of a run.

        Args:
            method: name of a method.
            seed: a seed that it finished.
            tuned: whether of the tuned or of the untuned estimator.

        Returns:
            Values by key.
        """


@dataclass(frozen=True)
class Section:
    """A part of a task in the report: text, a table and figures, each of which may be empty.

    Args:
        title: the heading.
        text: paragraphs of plain text above the table.
        header: names of the columns.
        rows: entries of the table, as text or numbers; all rows have the length of the header.
        figures: figures of matplotlib by their captions; the page shows them as SVG.

    Example:
        >>> Section("Extremes", header=["method", "variance"], rows=[["map", 0.0]]).title
        'Extremes'
    """

    title: str
    text: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str | float]] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)


MakeSection: TypeAlias = Callable[[SectionResults], Section | None]

SECTIONS: dict[str, MakeSection] = {}
"""The sections that plugins have added, by name."""
