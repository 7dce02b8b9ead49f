"""Numbers of bytes and seconds as text."""

from __future__ import annotations

__all__ = ["in_bytes", "in_seconds"]


def in_bytes(number: float) -> str:
    """Return a number of bytes as text, such as "3.2 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 999.5 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.3g} {unit}"


def in_seconds(seconds: float) -> str:
    """Return a duration as text, such as "12 ms", "3.1 s", "5 min" or "2.5 h"."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"
