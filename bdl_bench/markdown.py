"""Tables in Markdown, of reports, verifications and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, align_right: bool = False) -> list[str]:
    """Return the lines of a table; with `align_right`, all columns but the first are aligned to the right."""
    rule = ["---", *["---:" if align_right else "---"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
