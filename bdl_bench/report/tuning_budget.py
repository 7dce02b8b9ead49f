"""The budget of tuning in words, from the records."""

from __future__ import annotations

from collections.abc import Sequence

from bdl_bench.records.record import Record

__all__ = ["tuning_budget"]


def tuning_budget(records: Sequence[Record]) -> str:
    """Return a phrase with the number of fits that tuning was allowed and has made, the untuned fit included.

    Args:
        records: of all runs.

    Returns:
        Words that end a sentence on tuning; empty if nothing was tuned.
    """
    tuned = [record for record in records if record.status == "ok" and record.tuning is not None]
    if not tuned:
        return ""
    budgets = sorted({int(record.configuration.get("tune_budget", "0")) for record in tuned} - {0})
    used = _between(sorted({record.tuning.fits + 1 for record in tuned if record.tuning is not None}))
    if not budgets:
        return f"{used} per method"
    if len(budgets) > 1:
        return f"a budget of {budgets[0]} to {budgets[-1]} fits, which differs between runs (used: {used})"
    return f"a budget of {_between(budgets)} for every method (used: {used})"


def _between(numbers: Sequence[int]) -> str:
    low, high = numbers[0], numbers[-1]
    return f"{high} fit{'' if high == 1 else 's'}" if low == high else f"{low} to {high} fits"
