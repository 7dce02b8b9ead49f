"""Published numbers with their error bars, as they were printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BDE", "UCI", "Published", "parse"]

Position = Literal["inside", "below", "above"]


@dataclass(frozen=True)
class Published:
    """A printed number and its error bar.

    Args:
        value: the number.
        bar: the number after ±, as it was rounded, such as 0.00; None if none was printed.
        unit: of the last printed digit, such as 0.01.
    """

    value: float
    bar: float | None
    unit: float

    def position(self, ours: float) -> Position:
        """Return where a number lies relative to value ± bar, which is extended by the rounding of both.

        Args:
            ours: the number, in the same unit.

        Returns:
            "inside", or "below" or "above" it.
        """
        rounding = self.unit / 2
        reach = rounding if self.bar is None else self.bar + 2 * rounding
        if abs(ours - self.value) <= reach * (1 + 1e-9):
            return "inside"
        return "below" if ours < self.value else "above"

    def __str__(self) -> str:
        digits = max(0, round(-_log10(self.unit)))
        return f"{self.value:.{digits}f}" + (f" ± {self.bar:.{digits}f}" if self.bar is not None else "")


def parse(text: str) -> Published:
    """Return the number in a text such as "5.67±.09", ".10" or "-3.73±.01".

    Args:
        text: as it was printed.

    Returns:
        The number with its bar and the unit of its last digit.

    Example:
        >>> str(parse("5.67±.09"))
        '5.67 ± 0.09'
    """
    value, _, bar = text.replace("−", "-").partition("±")
    digits = len(value.partition(".")[2])
    return Published(float(value), float(bar) if bar else None, 10.0**-digits)


def _log10(unit: float) -> int:
    return round(len(f"{unit:.10f}".rstrip("0").partition(".")[2]) * -1)


_UCI_COLUMNS = ("PBP", "dropout", "ensemble", "dropout, tuned per split")
_UCI_ROWS = """
concrete | 5.67±.09 5.23±.53 6.03±.58 4.82±.16 | 3.16±.02 3.04±.09 3.06±.18 2.93±.02
energy | 1.80±.05 1.66±.19 2.09±.29 .54±.06 | 2.04±.02 1.99±.09 1.38±.22 1.21±.01
kin8nm | .10 .10 .09 .08 | -.90±.01 -.95±.03 -1.20±.02 -1.14±.01
naval | .01 .01 .00 .00 | -3.73±.01 -3.80±.05 -5.63±.05 -4.45±.00
power | 4.12±.03 4.02±.18 4.11±.17 4.01±.04 | 2.84±.01 2.80±.05 2.79±.04 2.80±.01
protein | 4.73±.01 4.36±.04 4.71±.06 4.27±.02 | 2.97±.00 2.89±.01 2.83±.02 2.87±.00
wine | .64±.01 .62±.04 .64±.04 .62±.01 | .97±.01 .93±.06 .94±.12 .93±.01
yacht | 1.02±.05 1.11±.38 1.58±.48 .67±.05 | 1.63±.02 1.55±.12 1.18±.21 1.25±.01
"""
"""In a row: the RMSE of each column | the NLL of each column. The first three columns are Table 1 of Lakshminarayanan
et al. (2017), who took PBP from Hernández-Lobato and Adams (2015) and dropout from Gal and Ghahramani (2016). The last
is from the readme of Gal's repository. ± is the standard deviation over splits in the columns "dropout" and "ensemble",
and the standard error in "PBP" and "dropout, tuned per split"."""

_BDE_COLUMNS = ("linear model", "deep ensemble", "BDE (MILE)")
_BDE_ROWS = """
airfoil | .6598±.0000 .3650±.0038 .1215±.0042 | 1.0032±.0000 .4100±.0105 -.6888±.0347
bike | .7796±.0000 .2880±.0052 .2261±.0016 | 1.1700±.0000 .1740±.0181 -.0679±.0071
"""
"""RMSE and "NLL (mean regr.)" of Arvanitis et al. (2025), ± the standard deviation over 5 runs."""


def _table(columns: tuple[str, ...], rows: str) -> dict[str, dict[str, dict[str, Published]]]:
    """Return {metric: {set: {column: number}}} of a table with a row for each set."""
    table: dict[str, dict[str, dict[str, Published]]] = {"RMSE": {}, "NLL": {}}
    for line in rows.strip().splitlines():
        name, *parts = (part.strip() for part in line.split("|"))
        for metric, part in zip(table, parts, strict=True):
            table[metric][name] = dict(zip(columns, map(parse, part.split()), strict=True))
    return table


UCI = _table(_UCI_COLUMNS, _UCI_ROWS)
BDE = _table(_BDE_COLUMNS, _BDE_ROWS)
