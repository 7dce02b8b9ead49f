"""The page docs/benchmarks/statistics.md: levels, coverage and power of the statistics of the report."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import table
from benchmarks.records import Measured
from benchmarks.statistics.measure import SEEDS, SHIFTS

__all__ = ["to_markdown"]

_HEAD = """# Do the tests and intervals of the report have their stated levels?

A method is compared with itself, under other random numbers, by the functions that the report calls. Every significant
difference is false, and at most 5 % may be. Each entry is a share of 1,000 simulated comparisons, in percent; its
standard error is 0.7 at 5 %. [Metrics](../guide/metrics.md#comparisons) describes the tests. The command is `python -m
benchmarks --select statistics`.

The score of a test row is the sum of the difficulty of the row (standard deviation 0.8, shared by both methods), an
effect of the seed of the method (0.3), and a part of its own (0.5). Heavy-tailed scores are the exponential of that
sum. Accuracy is 1 for scores below 0.8. RMSE is the root of the mean of squared scores. ECE and AUROC are computed from
confidences and detection scores with the same effects. In *new splits* each seed has its own test rows; in *one fixed
test set* all seeds have the same rows. *Rows with preferences* have an additional effect of row and method (0.4), with
mean 0 over rows: the methods are equal on average over all rows, but not on a given test set. *Copies* are one network
under several seeds.

"""

_FOUND = """## What was found

{summary}

- The bootstrap of version 0.1, seeds first and then rows, is in the last column of each table. It counts every row of a
  seed as an observation of a method, and its standard deviation over n seeds is √((n − 1)/n) times too small.
- With two seeds there is no test. A t-test would need a difference of 12.7 standard errors.
- With one test row that all seeds share there is no test, since the variation of rows is unknown.
- Seeds with identical predictions count as one, so that copies of one network are never compared.

"""


def to_markdown(rows: dict[str, Measured]) -> str:
    """Return the text of the page from the measured rows by name."""
    levels = [row for row in rows.values() if "quantity" in row and "level" in row["points"][0]]
    powers = [row for row in rows.values() if "power" in row["points"][0]]
    columns = [row for row in rows.values() if "n_methods" in row]
    parts = [_HEAD, _FOUND.format(summary=_summary(levels))]
    for design in dict.fromkeys(row["design"] for row in levels):
        parts += _level_table(design, [row for row in levels if row["design"] == design])
    parts += _coverage_table([row for row in levels if "copies" not in row["design"]])
    for found in columns:
        parts += _column_table(found)
    parts += _power_table(powers)
    return "".join(parts).rstrip() + "\n"


def _summary(levels: list[Measured]) -> str:
    tested = [point["level"] for row in levels for point in row["points"] if point["seeds"] > 2]
    if not tested:
        return ""
    above = sum(level > 0.07 for level in tested)
    return (
        f"- Of {len(tested)} combinations of design, metric, rows and at least 3 seeds, {above} have a share of false "
        f"significant differences above 7 %. The largest share is {100 * max(tested):.1f} %."
    )


def _level_table(design: str, rows: list[Measured]) -> list[str]:
    lines = []
    for row in rows:
        for n_rows in dict.fromkeys(point["rows"] for point in row["points"]):
            points = {p["seeds"]: p for p in row["points"] if p["rows"] == n_rows}
            bootstrap = " / ".join(_percent(points[s]["bootstrap"]) for s in SEEDS if s in points)
            levels = [_level(points[s]) if s in points else "–" for s in SEEDS]
            lines.append((row["quantity"], str(n_rows), *levels, bootstrap))
    header = (
        "metric",
        "rows",
        *(f"{s} seeds" for s in SEEDS),
        f"bootstrap of 0.1 ({' / '.join(map(str, SEEDS))} seeds)",
    )
    return [f"## False significant differences: {design}\n\n{table(header, lines)}\n\n"]


def _level(point: dict[str, Any]) -> str:
    return "not tested" if point["unknown"] == 1 else _percent(point["level"])


def _coverage_table(rows: list[Measured]) -> list[str]:
    lines = []
    for row in rows:
        for n_rows in dict.fromkeys(point["rows"] for point in row["points"]):
            points = {p["seeds"]: p["coverage"] for p in row["points"] if p["rows"] == n_rows}
            shown = ["–" if points.get(s) is None else _percent(points[s]) for s in SEEDS]
            lines.append((row["design"], row["quantity"], str(n_rows), *shown))
    header = ("design", "metric", "rows", *(f"{s} seeds" for s in SEEDS))
    text = (
        "How many of the 95 % intervals of a metric of one method contain its mean over all simulated experiments. "
        "With few rows of heavy-tailed scores no interval of this kind covers at its level, since large scores are "
        "mostly absent from the sample; the difference of two methods does not have this skewness."
    )
    return [f"## Coverage of the intervals of a metric\n\n{text}\n\n{table(header, lines)}\n\n"]


def _column_table(found: Measured) -> list[str]:
    lines = [(p["design"], str(p["seeds"]), _percent(p["baseline"]), _percent(p["best"])) for p in found["points"]]
    text = (
        f"A column of {found['n_methods']} equal methods, {found['rows']} test rows: the share of columns in which any "
        "method is called significantly different from the baseline, or significantly worse than the best."
    )
    header = ("design", "seeds", "from the baseline", "worse than the best")
    return [f"## Whole columns\n\n{text}\n\n{table(header, lines)}\n\n"]


def _power_table(powers: list[Measured]) -> list[str]:
    lines = []
    for row in powers:
        for shift in SHIFTS:
            points = {p["seeds"]: p["power"] for p in row["points"] if p["shift"] == shift}
            lines.append((row["design"], row["quantity"], f"{shift:g}", *(_percent(points[s]) for s in SEEDS)))
    text = (
        "The share of true differences that are found, with 50 test rows. The difference is in standard deviations of "
        "the difference of one seed."
    )
    header = ("design", "metric", "difference", *(f"{s} seeds" for s in SEEDS))
    return [f"## Power\n\n{text}\n\n{table(header, lines)}\n"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
