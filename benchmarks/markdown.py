"""Entries of Markdown tables: goals and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bdl_bench.markdown import markdown_table

__all__ = ["gib", "table", "verdict"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with one line per row."""
    return "\n".join(markdown_table(header, rows))


def verdict(value: float, goal: float | None, *, at_most: bool = False) -> tuple[str, str]:
    """Return the goal as text, and whether it is reached; two dashes if there is no goal."""
    if goal is None:
        return "–", "–"
    reached = value <= goal if at_most else value >= goal
    return f"{'≤' if at_most else '≥'} {goal:,g}", "reached" if reached else "**missed**"


def gib(size: float) -> str:
    """Return bytes in GiB without the unit, as "0.53"; the unit is in the table header."""
    return f"{size / 2**30:.2f}"
