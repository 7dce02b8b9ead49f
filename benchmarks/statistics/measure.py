"""Shares of significant differences, and coverage of intervals, by the functions that the report calls."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from bdl_bench.metrics.contributions import row_contributions
from bdl_bench.report.seed_design import same_predictions
from bdl_bench.stats import compare_methods, distinct_seeds, intervals_over_seeds
from benchmarks.records import Measured
from benchmarks.statistics.worlds import DESIGNS, QUANTITIES, Arrays, Design, Quantity

__all__ = ["N_COMPARISONS", "ROWS", "SEEDS", "SHIFTS", "measure_columns", "measure_level", "measure_power"]

Floats = NDArray[np.float64]
SEEDS = (2, 3, 5, 10)
ROWS = (1, 5, 50, 500)
SHIFTS = (0.5, 1.0, 2.0, 4.0)
"""True differences of the means, in standard deviations of the difference of one seed."""
N_COMPARISONS = 1000
_METHODS = ("a", "b")
_DESIGN = {design.name: design for design in DESIGNS}


def measure_level(
    design: str,
    quantity: str,
    *,
    n_comparisons: int = N_COMPARISONS,
    rows: Sequence[int] = ROWS,
    seeds: Sequence[int] = SEEDS,
) -> Measured:
    """Compare a method with itself many times.

    Args:
        design: name of a design.
        quantity: name of a quantity.
        n_comparisons: number of comparisons for each number of rows; all numbers of seeds use the same ones.
        rows: numbers of test rows.
        seeds: numbers of seeds.

    Returns:
        By rows and seeds: the share of comparisons with a significant difference (`level`), of those without a test
        (`unknown`), and of those that are significant by the bootstrap of version 0.1 (`bootstrap`); the share of
        intervals that cover the mean of all comparisons (`coverage`), None without an interval.
    """
    found: Measured = {"design": design, "quantity": quantity, "n_comparisons": n_comparisons, "points": []}
    for n_rows in rows:
        runs = [
            _Runs.simulated(_DESIGN[design], QUANTITIES[quantity], max(seeds), n_rows, rng)
            for rng in np.random.default_rng([n_rows, *map(ord, design + quantity)]).spawn(n_comparisons)
        ]
        target = float(np.mean([run.means for run in runs]))
        for n_seeds in seeds:
            verdicts = [run.verdict(n_seeds) for run in runs]
            intervals = [run.covers(n_seeds, target) for run in runs]
            known = [covers for covers in intervals if covers is not None]
            found["points"].append(
                {
                    "rows": n_rows,
                    "seeds": n_seeds,
                    "level": float(np.mean([v in ("better", "worse") for v in verdicts])),
                    "unknown": float(np.mean([v == "unknown" for v in verdicts])),
                    "bootstrap": float(np.mean([run.bootstrap_p_value(n_seeds) <= 0.05 for run in runs])),
                    "coverage": float(np.mean(known)) if known else None,
                }
            )
    return found


class _Runs:
    """The runs of two methods: contributions of rows by method and seed, and which seeds are copies."""

    def __init__(self, design: Design, quantity: Quantity, arrays: dict[str, dict[int, Arrays]], shift: float) -> None:
        self.same_rows = design.same_rows
        self.metric = quantity.metric
        self.values = {
            m: {s: self._contributions(a) + (shift if m == "b" else 0.0) for s, a in by_seed.items()}
            for m, by_seed in arrays.items()
        }
        self.copies = {m: _copies(by_seed) for m, by_seed in arrays.items()}

    @classmethod
    def simulated(
        cls, design: Design, quantity: Quantity, n_seeds: int, n_rows: int, rng: np.random.Generator, shift: float = 0.0
    ) -> _Runs:
        scores, effects = design.latent(rng, n_seeds=n_seeds, n_rows=n_rows)
        streams = rng.integers(2**32, size=n_seeds)
        if design.same_rows:
            streams[:] = streams[0]  # labels and other rows belong to the test set
        arrays: dict[str, dict[int, Arrays]] = {}
        for m, method in enumerate(_METHODS):
            arrays[method] = {}
            for seed in range(n_seeds):
                made = quantity.arrays(
                    scores[m, seed], float(effects[m, seed, 0]), np.random.default_rng(streams[seed])
                )
                ids = np.arange(n_rows, dtype=np.uint64) + np.uint64(0 if design.same_rows else seed * 2**32)
                arrays[method][seed] = {**made, "row_id": ids}
        return cls(design, quantity, arrays, shift)

    def _contributions(self, arrays: Arrays) -> Floats:
        return row_contributions(self.metric, arrays) if self.same_rows else np.array([self.metric.value(arrays)])

    @property
    def means(self) -> float:
        return float(np.mean([v.mean() for v in self.values["a"].values()]))

    def _first(self, n_seeds: int) -> dict[str, dict[int, Floats]]:
        return {m: {s: v for s, v in by_seed.items() if s < n_seeds} for m, by_seed in self.values.items()}

    def verdict(self, n_seeds: int) -> str:
        found = compare_methods(self._first(n_seeds), "lower", same_rows=self.same_rows, copies=self.copies)
        return found.pairs[_METHODS]

    def covers(self, n_seeds: int, target: float) -> bool | None:
        """Return whether the interval of method a covers the target; None without an interval."""
        seeds = distinct_seeds(range(n_seeds), ["a"], self.copies)
        values = [self.values["a"][seed][:, None] for seed in seeds]
        (interval,) = intervals_over_seeds(values, same_rows=self.same_rows)
        return None if interval.low is None or interval.high is None else interval.low <= target <= interval.high

    def bootstrap_p_value(self, n_seeds: int) -> float:
        """Return the p-value of the bootstrap of seeds and, within each, of rows, in the limit of many resamples."""
        seeds = [self.values["a"][s] - self.values["b"][s] for s in range(n_seeds)]
        means = np.array([d.mean() for d in seeds])
        variance = (means.var() + np.mean([d.var() / len(d) for d in seeds])) / n_seeds
        mean = float(means.mean())
        return float(2 * norm.sf(abs(mean) / np.sqrt(variance))) if variance > 1e-24 else float(mean == 0)


def _copies(by_seed: dict[int, Arrays]) -> dict[int, int]:
    """Return the first seed with the same predictions, as the report finds it; neighbours suffice in these designs."""
    found = {0: 0}
    for earlier, seed in pairwise(by_seed):
        found[seed] = found[earlier] if same_predictions(by_seed[seed], by_seed[earlier]) else seed
    return found


def measure_power(design: str, quantity: str, *, n_comparisons: int = N_COMPARISONS, n_rows: int = 50) -> Measured:
    """Compare two methods whose means differ.

    Args:
        design: name of a design.
        quantity: name of a quantity.
        n_comparisons: number of comparisons of each difference.
        n_rows: number of test rows.

    Returns:
        The share of significant differences for each of `SHIFTS` and each number of seeds.
    """
    world, made = _DESIGN[design], QUANTITIES[quantity]
    rng = np.random.default_rng([7, *map(ord, design + quantity)])
    runs = [_Runs.simulated(world, made, max(SEEDS), n_rows, child) for child in rng.spawn(n_comparisons)]
    unit = float(np.std([run.values["a"][0].mean() - run.values["b"][0].mean() for run in runs]))
    points = []
    for shift in SHIFTS:
        for run in runs:
            run.values["b"] = {s: v + shift * unit for s, v in run.values["b"].items()}
        for n_seeds in SEEDS:
            share = float(np.mean([run.verdict(n_seeds) == "better" for run in runs]))
            points.append({"shift": shift, "seeds": n_seeds, "power": share})
        for run in runs:
            run.values["b"] = {s: v - shift * unit for s, v in run.values["b"].items()}
    return {"design": design, "quantity": quantity, "n_comparisons": n_comparisons, "rows": n_rows, "points": points}


def measure_columns(n_methods: int = 6, *, n_columns: int = N_COMPARISONS, n_rows: int = 50) -> Measured:
    """Compare several equal methods with one of them and with the best, as in a column of the report.

    Args:
        n_methods: number of methods, the first of which is the baseline.
        n_columns: number of simulated columns.
        n_rows: number of test rows.

    Returns:
        The share of columns with any significant difference from the baseline, and from the best, by design and seeds.
    """
    points = []
    for design in DESIGNS[:2]:
        rng = np.random.default_rng([11, *map(ord, design.name)])
        for n_seeds in SEEDS[1:]:
            baseline = best = 0
            for _ in range(n_columns):
                scores, effects = design.latent(rng, n_seeds=n_seeds, n_rows=n_rows, n_methods=n_methods)
                rows = scores + effects
                values = {
                    f"m{m}": {s: _as_reported(rows[m, s], design) for s in range(n_seeds)} for m in range(n_methods)
                }
                found = compare_methods(values, "lower", same_rows=design.same_rows, baseline="m0")
                means = {m: float(np.mean([v.mean() for v in by_seed.values()])) for m, by_seed in values.items()}
                against_best = found.with_method(min(means, key=lambda m: means[m]))
                baseline += any(v in ("better", "worse") for v in found.with_baseline.values())
                best += "worse" in against_best.values()
            shares = {"baseline": baseline / n_columns, "best": best / n_columns}
            points.append({"design": design.name, "seeds": n_seeds, **shares})
    return {"n_methods": n_methods, "n_columns": n_columns, "rows": n_rows, "points": points}


def _as_reported(rows: Floats, design: Design) -> Floats:
    return rows if design.same_rows else rows.mean(keepdims=True)
