"""Tables in Markdown, and the words of a goal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["gib", "table", "verdict"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One line a row."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(value: float, goal: float | None, *, at_most: bool = False) -> tuple[str, str]:
    """The goal in words, and whether it is reached; two dashes where there is none."""
    if goal is None:
        return "–", "–"
    reached = value <= goal if at_most else value >= goal
    return f"{'≤' if at_most else '≥'} {goal:,g}", "reached" if reached else "**missed**"


def gib(size: float) -> str:
    """Bytes in GiB, as "0.53"."""
    return f"{size / 2**30:.2f}"
