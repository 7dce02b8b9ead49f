"""The budget of tuning in words, from the records."""

from __future__ import annotations

from collections.abc import Sequence

from bdl_bench.records.record import Record

__all__ = ["tuning_budget"]


def tuning_budget(records: Sequence[Record]) -> str:
    """Return the number of fits that tuning could use and the number that it used, for instance "at most 5 fits".

    Args:
        records: of all runs.

    Returns:
        Words that end a sentence on tuning; empty if nothing was tuned.
    """
    tuned = [record for record in records if record.status == "ok" and record.tuning is not None]
    if not tuned:
        return ""
    budgets = sorted({int(record.configuration.get("tune_budget", "0")) for record in tuned} - {0})
    used = sorted({record.tuning.fits for record in tuned if record.tuning is not None})
    range_of_fits = _between(used)
    if not budgets:
        return f"{range_of_fits} per method"
    if len(budgets) > 1:
        return f"a budget of {budgets[0]} to {budgets[-1]} fits, not the same for all runs; used: {range_of_fits}"
    return f"a budget of {_between(budgets)} for every method; used: {range_of_fits}"


def _between(numbers: Sequence[int]) -> str:
    low, high = numbers[0], numbers[-1]
    return f"{high} fit{'' if high == 1 else 's'}" if low == high else f"{low} to {high} fits"
