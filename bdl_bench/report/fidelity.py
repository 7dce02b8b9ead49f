"""Distances of every method from the posterior that was sampled, at the test rows and at rows unlike the data.

All are computed from records. That of `reference-posterior` has its predictions by all chains, by even and by odd ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from bdl_bench.methods import POSTERIOR
from bdl_bench.metrics.fidelity import HALVES, Fidelity, fidelity, main_distance, noise_floor, ranks_above_noise
from bdl_bench.problem.severity import most_severe
from bdl_bench.report.arrays import ArrayView
from bdl_bench.report.results import TaskResults
from bdl_bench.report.seed_design import SeedDesign
from bdl_bench.stats import Interval, mean_interval

__all__ = ["FidelityRow", "FidelitySet", "FidelityTable", "fidelity_of_run", "fidelity_sets", "posterior_sets"]


@dataclass(frozen=True)
class FidelityRow:
    """One method: its rank by the main distance, and means over distinct seeds of the fields of `Fidelity`.

    `rank` is None for a method that misses a seed. An interval is None if a seed has no such number.
    """

    method: str
    rank: int | None
    intervals: dict[str, Interval | None]


@dataclass(frozen=True)
class FidelityTable:
    """All methods, untuned or tuned on validation data, in the order of the registry."""

    tuned: bool
    rows: list[FidelityRow]

    def distances(self, field: str) -> dict[str, float]:
        """Return the mean over seeds of a field, of the methods that have a rank."""
        found = {row.method: row.intervals[field] for row in self.rows if row.rank is not None}
        return {method: interval.mean for method, interval in found.items() if interval is not None}


@dataclass(frozen=True)
class FidelitySet:
    """Distances at one set of rows.

    Args:
        key: name of the set in records: "test", "ood/<set>" or "shift/<set>".
        main: field of `Fidelity` by which methods are ranked.
        floor: noise floor of each field, mean over seeds.
        untuned: the table of untuned predictions.
        tuned: that of tuned ones; None if no method was tuned.
    """

    key: str
    main: str
    floor: dict[str, float | None]
    untuned: FidelityTable
    tuned: FidelityTable | None

    @property
    def name(self) -> str:
        """The name of the set for readers."""
        return "test rows" if self.key == "test" else self.key.partition("/")[2]

    @property
    def tables(self) -> list[FidelityTable]:
        """The untuned table, and the tuned one if there is one."""
        return [self.untuned] if self.tuned is None else [self.untuned, self.tuned]

    @property
    def compared(self) -> FidelityTable:
        """The table that is shown first: untuned, since the posterior is that of the prior of the task."""
        return self.untuned


def posterior_sets(results: TaskResults) -> list[str]:
    """Return the names of the sets of rows at which the posterior is known.

    They are the test rows, every out-of-distribution set, and each shift at its largest severity.

    Args:
        results: of one task.

    Returns:
        Names in records; none if the posterior was not sampled.
    """
    runs = results.finished.get(POSTERIOR)
    if not runs:
        return []
    first = results.predictions(POSTERIOR, min(runs))
    keys = [
        "test",
        *(f"ood/{name}" for name in first.sets("ood")),
        *(f"shift/{n}" for n in most_severe(first.sets("shift"))),
    ]
    return [key for key in keys if f"{HALVES[0]}_mean" in _rows_of(first, key)]


def fidelity_sets(results: TaskResults, design: SeedDesign) -> list[FidelitySet]:
    """Return the distances at each set of rows at which the posterior is known.

    Args:
        results: of one task.
        design: how its seeds differ; seeds with identical predictions count as one.

    Returns:
        Means over distinct seeds, by set.
    """
    return [_set(results, design, key) for key in posterior_sets(results)]


def fidelity_of_run(results: TaskResults, method: str, seed: int, key: str, *, tuned: bool = False) -> Fidelity:
    """Return the distances of one run at one set of rows.

    Args:
        results: of one task.
        method: name of the method.
        seed: a seed that the method and the posterior finished.
        key: name of the set in records.
        tuned: whether the predictions are those of the tuned estimator.

    Returns:
        The distances from the posterior at the prior of the task, which is never tuned.
    """
    found = _rows_of(results.predictions(method, seed, tuned=tuned), key)
    return fidelity(results.kind, found, _rows_of(results.predictions(POSTERIOR, seed), key))


def _set(results: TaskResults, design: SeedDesign, key: str) -> FidelitySet:
    main, seeds = main_distance(results.kind), design.distinct(results.finished[POSTERIOR], [POSTERIOR])
    floors = [noise_floor(results.kind, _rows_of(results.predictions(POSTERIOR, seed), key)) for seed in seeds]
    floor = {name: _mean(asdict(found)[name] for found in floors) for name in asdict(floors[0])}
    tuned = [m for m in results.tuned_methods if m != POSTERIOR]
    methods = [m for m in results.methods if m != POSTERIOR]
    return FidelitySet(
        key,
        main,
        floor,
        _table(results, design, methods, key, main, floor[main] or 0.0, tuned=False),
        _table(results, design, tuned, key, main, floor[main] or 0.0, tuned=True) if tuned else None,
    )


def _table(
    results: TaskResults, design: SeedDesign, methods: list[str], key: str, main: str, floor: float, *, tuned: bool
) -> FidelityTable:
    intervals: dict[str, dict[str, Interval | None]] = {}
    for method in methods:
        seeds = design.distinct(results.shared_seeds(method, POSTERIOR), [method, POSTERIOR])
        found = [asdict(fidelity_of_run(results, method, seed, key, tuned=tuned)) for seed in seeds]
        if found:
            intervals[method] = {name: _interval(values[name] for values in found) for name in found[0]}
    complete = {m for m in intervals if results.shared_seeds(m, POSTERIOR) == sorted(results.finished[POSTERIOR])}
    mains = {m: found[main] for m, found in intervals.items() if m in complete}
    ranks = ranks_above_noise({m: found.mean for m, found in mains.items() if found is not None}, floor)
    return FidelityTable(tuned, [FidelityRow(m, ranks.get(m), found) for m, found in intervals.items()])


def _rows_of(view: ArrayView, key: str) -> ArrayView:
    """Return the arrays of one set under plain names."""
    return view if key == "test" else view.subset(key)


def _interval(values: Iterable[float | None]) -> Interval | None:
    numbers = list(values)
    known = [value for value in numbers if value is not None]
    return mean_interval(known) if len(known) == len(numbers) else None


def _mean(values: Iterable[float | None]) -> float | None:
    found = _interval(values)
    return None if found is None else found.mean
