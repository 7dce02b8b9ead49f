"""Sets of shifted rows are named "<family>-<severity>": the most severe one of each family."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["most_severe"]

_SEVERITY = re.compile(r"(.+)-(\d+)")


def most_severe(names: Iterable[str]) -> list[str]:
    """Return the name with the largest severity of each family; names without a severity as they are.

    Args:
        names: names of sets, such as "noise-1", "noise-5" and "blurred".

    Returns:
        One name per family, in the order of the families.

    Example:
        >>> most_severe(["noise-1", "noise-5", "blurred"])
        ['noise-5', 'blurred']
    """
    largest: dict[str, tuple[int, str]] = {}
    for name in names:
        match = _SEVERITY.fullmatch(name)
        family, severity = (match[1], int(match[2])) if match else (name, 0)
        largest[family] = max(largest.get(family, (-1, "")), (severity, name))
    return [name for _, name in largest.values()]
