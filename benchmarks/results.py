"""The tables of docs/benchmarks/results.md: quality and fidelity of all methods of one run of `compare`.

`python -m benchmarks.results DIR --out FILE` writes them as Markdown, from the records in DIR.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from bdl_bench.records.record import RecordStore
from bdl_bench.report.fidelity import FidelitySet, fidelity_sets
from bdl_bench.report.reference_agreement import agreement_rows
from bdl_bench.report.results import TaskResults, group_by_task, load_records
from bdl_bench.report.seed_design import SeedDesign, seed_design
from benchmarks.markdown import table
from estimators.persistence.atomic import write_text

__all__ = ["main", "tables"]

_NLL = ("reg/NLL", "cls/NLL")
Columns = Mapping[str, Mapping[str, str]]
"""Entries of a table: column -> method -> text."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables of a run.

    Args:
        arguments: the words of the command line; None: those of this process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description="Tables of a run of compare.")
    parser.add_argument("run", type=Path, help="directory of a run of compare")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args(arguments)
    store = RecordStore(options.run)
    write_text(options.out, tables(group_by_task(store, load_records(store))))


def tables(tasks: Sequence[TaskResults]) -> str:
    """Return the tables as Markdown.

    Args:
        tasks: the results of each task.

    Returns:
        Tables of the negative log-likelihood, of the distance from the posterior and the ratio of variances to it, and
        of the agreement with linearized Laplace. Methods with more columns come first, and among these the methods with
        the lower mean rank: by the tuned negative log-likelihood, followed by the methods that were not tuned, in the
        first table; by the distances in the second and third one. The agreement is in alphabetical order.
    """
    designs = {one.name: seed_design(one) for one in tasks}
    sets = {one.name: fidelity_sets(one, designs[one.name]) for one in tasks}
    tuned = {one.name: found for one in tasks if (found := _nll(one, tuned=True))}
    untuned = {f"{one.name}, untuned": _nll(one, tuned=False) for one in tasks}
    distances = {column: _field(found, found.main) for column, found in _columns(sets)}
    ratios = {column: _field(found, "mean_ratio") for column, found in _columns(sets)}
    agreement = {one.name: _agreement(one, designs[one.name]) for one in tasks}
    floors = {column: found.floor for column, found in _columns(sets)}
    main = {column: found.main for column, found in _columns(sets)}
    distance_floor = {column: _number(floors[column][main[column]]) for column in distances}
    ratio_floor = {column: _number(floors[column]["mean_ratio"], digits=2) for column in ratios}
    order = _by_mean_rank(distances)
    order_nll = list(dict.fromkeys([*_by_mean_rank(tuned), *_by_mean_rank(untuned)]))
    return "\n\n".join(
        [
            "## Negative log-likelihood of the test rows",
            _markdown(order_nll, _texts(tuned | untuned)),
            "## Distance from the posterior, untuned",
            _markdown(order, _texts(distances), first=distance_floor),
            "## Ratio of the mean variances, untuned",
            _markdown(order, _texts(ratios, digits=2), first=ratio_floor),
            "## Agreement with linearized Laplace, untuned: Spearman, relative RMSE",
            _markdown(sorted({m for found in agreement.values() for m in found}), agreement),
            "",
        ]
    )


def _columns(sets: Mapping[str, Sequence[FidelitySet]]) -> list[tuple[str, FidelitySet]]:
    return [(f"{task}: {found.name}", found) for task, of_task in sets.items() for found in of_task]


def _nll(results: TaskResults, *, tuned: bool) -> dict[str, float]:
    """Return the mean over seeds of the methods that finished every seed."""
    key = next(metric.key for metric in results.all_metrics if metric.key in _NLL)
    methods = results.tuned_methods if tuned else results.methods
    found = {m: results.values(m, key, tuned=tuned) for m in methods if m in results.complete_methods}
    return {method: fmean(values) for method, values in found.items() if values}


def _field(found: FidelitySet, field: str) -> dict[str, float]:
    """Return a field of `Fidelity`, mean over seeds, of all methods that have one."""
    intervals = {row.method: row.intervals[field] for row in found.untuned.rows}
    return {method: interval.mean for method, interval in intervals.items() if interval is not None}


def _agreement(results: TaskResults, design: SeedDesign) -> dict[str, str]:
    """Return Spearman and relative RMSE of each method as text."""
    found = {}
    for row in agreement_rows(results, design):
        spearman = None if row.spearman is None else row.spearman.mean
        found[row.method] = f"{_number(spearman, digits=2)}, {_number(row.relative_rmse.mean, digits=2)}"
    return found


def _by_mean_rank(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the methods by their mean rank over the columns, those with every column first."""
    ranks: dict[str, list[int]] = {}
    for values in columns.values():
        for rank, method in enumerate(sorted(values, key=lambda m: values[m])):
            ranks.setdefault(method, []).append(rank)
    return sorted(ranks, key=lambda m: (-len(ranks[m]), fmean(ranks[m])))


def _texts(columns: Mapping[str, Mapping[str, float]], *, digits: int = 3) -> Columns:
    return {name: {m: _number(v, digits=digits) for m, v in values.items()} for name, values in columns.items()}


def _markdown(methods: Sequence[str], columns: Columns, *, first: Mapping[str, str] | None = None) -> str:
    rows = [[f"`{method}`", *(found.get(method, "–") for found in columns.values())] for method in methods]
    if first is not None:
        rows.insert(0, ["noise floor", *(first[name] for name in columns)])
    return table(["method", *columns], rows)


def _number(value: float | None, *, digits: int = 3) -> str:
    """Return a number without its leading zero, as ".052"."""
    if value is None:
        return "–"
    value = round(value, digits) or 0.0  # without the sign of a negative number that is rounded to zero
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


if __name__ == "__main__":
    main()
