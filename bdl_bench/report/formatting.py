"""Numbers and names as text for readers: few digits, one unit, a true minus sign."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf, isinf, log10

from bdl_bench.stats import Interval

__all__ = ["count", "effect", "join_names", "mean_and_half_width", "mean_of", "number"]

MINUS = "\N{MINUS SIGN}"
_SMALLEST, _LARGEST = 5e-4, 1e5  # outside of this range a number is written with a power of ten

_MOST_DECIMALS = 4


def number(value: float) -> str:
    """Return three decimals below 10, fewer above, more below 0.01; a power of ten for very small or large values."""
    text = f"{value:.1e}" if _is_scientific(value) else f"{value:.{_decimals(abs(value))}f}"
    return text.replace("-", MINUS)


def _is_scientific(value: float) -> bool:
    return value != 0 and not _SMALLEST <= abs(value) < _LARGEST


def _decimals(size: float) -> int:
    if 0 < size < 0.01:
        return 4 if size >= 0.001 else 5
    return 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0


def mean_and_half_width(interval: Interval) -> tuple[str, str]:
    """Return a mean and "± half-width" with the same number of decimals; the second is empty without an interval."""
    half = interval.half_width
    if half is None:
        return number(interval.mean), ""
    if half == 0 or any(_is_scientific(value) for value in (half, interval.mean)):
        return number(interval.mean), f"± {number(half)}"
    decimals = 3 if 0.001 <= half < 0.01 else _decimals(half)
    return f"{interval.mean:.{decimals}f}".replace("-", MINUS), f"± {half:.{decimals}f}"


def effect(interval: Interval, smallest: float) -> tuple[str, str]:
    """Return a difference and "± half-width", to one digit more than the smallest relevant difference has.

    If that has more than four digits or is 0, numbers that would all be rounded to 0 are returned in full.
    """
    needed = ceil(-log10(smallest)) + 1 if smallest > 0 else inf
    decimals = 3 if isinf(needed) else min(_MOST_DECIMALS, max(0, int(needed)))
    mean, half = (f"{value:.{decimals}f}" for value in (interval.mean, interval.half_width or 0.0))
    if needed > _MOST_DECIMALS and float(mean) == float(half) == 0.0:
        return mean_and_half_width(interval)
    signed = mean.replace("-", MINUS) if float(mean) else mean.removeprefix("-")
    return signed, "" if interval.half_width is None else f"± {half}"


def count(value: float | None) -> str:
    """Return a count with at most one decimal, none from 100 on; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def mean_of(label: str) -> str:
    """Return "mean" and the label of a metric, once if the label has it."""
    return label if label.startswith("mean ") else f"mean {label}"


def join_names(names: Sequence[str], most: int = 6) -> str:
    """Return the names with commas between them; of many, the first ones and how many follow."""
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
