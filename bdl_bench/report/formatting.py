"""Numbers as people read them: few digits, one unit, a true minus sign."""

from __future__ import annotations

from collections.abc import Sequence

from bdl_bench.stats import Interval

__all__ = ["count", "duration", "listed", "mebibytes", "number", "with_half_width"]

MINUS = "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Three decimals below ten, fewer above, more below 0.01, powers of ten outside 0.0005 to 100,000."""
    size = abs(value)
    text = f"{value:.1e}" if size != 0 and not 5e-4 <= size < 1e5 else f"{value:.{_decimals(size)}f}"
    return text.replace("-", MINUS)


def _decimals(size: float) -> int:
    if 0 < size < 0.01:
        return 4 if size >= 0.001 else 5
    return 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0


def with_half_width(interval: Interval) -> tuple[str, str]:
    """A mean and its half-width, the latter empty for a single number."""
    half = interval.half_width
    return number(interval.mean), "" if half is None else f"± {number(half)}"


def duration(seconds: float) -> str:
    """Milliseconds, seconds, or minutes and seconds."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.{0 if seconds >= 0.01 else 1}f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def mebibytes(size: float) -> str:
    """MiB without decimals, GiB with one above 10,000 MiB."""
    mib = size / 2**20
    return f"{mib:,.0f} MiB" if mib < 10_000 else f"{mib / 1024:,.1f} GiB"


def count(value: float | None) -> str:
    """A number of passes or points: no decimals from 100 on, one below, none for whole ones; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a row, the last of many only counted."""
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
