"""How the seeds of a task differ: in their test rows or not, and whether some are copies of one experiment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdl_bench.methods import BASELINE
from bdl_bench.report.formatting import join_names
from bdl_bench.report.pairing import order_of_test_rows
from bdl_bench.report.results import TaskResults
from bdl_bench.stats import FEWEST_SEEDS, TIE_TOLERANCE, distinct_seeds, seed_groups

__all__ = ["SeedDesign", "same_predictions", "seed_design"]

_COMPARED = ("mean", "epistemic_variance", "total_variance", "probs", "log_probs", "log_odds")
"""Arrays of the test rows by which predictions are found to be identical."""
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class SeedDesign:
    """The sample behind the statistics of a task.

    Args:
        seeds: the seeds with a finished run.
        n_rows: number of test rows of each seed.
        orders: for each seed, the indices that put its test rows into the order of the first seed; empty if the seeds
            have different test rows.
        copies: `copies[method][seed]`, the first seed with the same predictions. Seeds in which the baseline has the
            same predictions share a network, so they are copies for every method.
        n_distinct_rows: number of different test rows over all seeds.
    """

    seeds: list[int]
    n_rows: list[int]
    orders: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    copies: dict[str, dict[int, int]] = field(default_factory=dict)
    n_distinct_rows: int = 0

    @property
    def same_rows(self) -> bool:
        """Whether all of several seeds have the same test rows."""
        return len(self.seeds) > 1 and len(self.orders) == len(self.seeds)

    @property
    def repeats(self) -> float:
        """How often a test row occurs over the seeds, on average."""
        return sum(self.n_rows) / self.n_distinct_rows if self.n_distinct_rows else 1.0

    @property
    def n_distinct(self) -> int:
        """The largest number of distinct seeds of a method: the sample size of the tests."""
        return max((len(set(first.values())) for first in self.copies.values()), default=len(self.seeds))

    def distinct(self, seeds: Iterable[int], methods: Iterable[str]) -> list[int]:
        """Return one seed of each group in which one of the methods has identical predictions."""
        return distinct_seeds(sorted(seeds), methods, self.copies)

    @property
    def warnings(self) -> list[str]:
        """Sentences on copies, and on seeds or test rows that are too few for a test."""
        return [*self._about_copies(), *self._too_few()]

    @property
    def description(self) -> str:
        """How differences are tested, in sentences."""
        rows = f"{min(self.n_rows):,}"
        if max(self.n_rows) > min(self.n_rows):
            rows += f" to {max(self.n_rows):,}"
        if len(self.seeds) == 1:
            return f"There is one seed, with {rows} test row{'' if rows == '1' else 's'}; differences are not tested."
        if self.same_rows:
            return (
                f"The {len(self.seeds)} seeds share the same {rows} test rows. Tests and intervals count the variation "
                "between seeds and between test rows (two-way analysis of variance)."
            )
        overlap = (
            f" A test row occurs in {self.repeats:.1f} seeds on average, so the results hold for splits of these data."
            if self.repeats > 1.005
            else ""
        )
        return (
            f"Each of the {len(self.seeds)} seeds has its own {rows} test rows, so the seeds are the sample: tests are "
            f"t-tests of the differences of the seeds, paired by seed.{overlap}"
        )

    def _about_copies(self) -> list[str]:
        groups: dict[tuple[tuple[int, ...], ...], list[str]] = {}
        for method, first in self.copies.items():
            groups.setdefault(_groups(first), []).append(method)
        found = []
        for copied, methods in groups.items():
            if copied:
                seeds = "; ".join(f"seeds {', '.join(map(str, group))}" for group in copied)
                found.append(
                    f"Identical predictions for {seeds}: {join_names(methods)}. Identical seeds count as one. Check "
                    "whether the function that makes the problem uses its seed."
                )
        return found

    def _too_few(self) -> list[str]:
        if len(self.seeds) == 1 or self.n_distinct < FEWEST_SEEDS:
            n = self.n_distinct
            return [
                f"Too few seeds for a test: {n}{' distinct' if n < len(self.seeds) else ''}. With fewer than "
                f"{FEWEST_SEEDS} seeds no difference can be significant; differences of means may be chance."
            ]
        if self.same_rows and min(self.n_rows) == 1:
            return ["All seeds share a single test row, so differences cannot be tested."]
        return []


def seed_design(results: TaskResults) -> SeedDesign:
    """Return how the seeds of a task differ, from the identities of the test rows and the predictions."""
    seeds = results.seeds
    first = {seed: next(m for m, records in results.finished.items() if seed in records) for seed in seeds}
    rows = {seed: results.rows(first[seed], seed) for seed in seeds}
    sizes = [len(results.predictions(first[seed], seed)["mean"]) for seed in seeds]
    orders = {seed: order_of_test_rows(rows[seed], rows[seeds[0]]) for seed in seeds}
    found = {seed: order for seed, order in orders.items() if order is not None}
    ids = [rows[seed]["row_id"] for seed in seeds if "row_id" in rows[seed]]
    distinct = len(np.unique(np.concatenate(ids))) if len(ids) == len(seeds) else sum(sizes)
    same = len(found) == len(seeds)
    if same and len(ids) != len(seeds):
        distinct = sizes[0]
    return SeedDesign(seeds, sizes, found if same else {}, _copies(results), distinct)


def _copies(results: TaskResults) -> dict[str, dict[int, int]]:
    """Return, for each method and seed, the first seed with the same network or predictions."""
    identical = {method: _identical(results, method) for method in results.methods}
    return {m: seed_groups(sorted(results.finished[m]), {m, BASELINE}, identical) for m in results.methods}


def _identical(results: TaskResults, method: str) -> dict[int, int]:
    """Return, for each seed, the first seed whose predictions of the same test rows are identical up to round-off."""
    found: dict[int, int] = {}
    for seed in sorted(results.finished[method]):
        mine = results.predictions(method, seed)
        earlier = (s for s in dict.fromkeys(found.values()) if same_predictions(mine, results.predictions(method, s)))
        found[seed] = next(earlier, seed)
    return found


def same_predictions(mine: Arrays, theirs: Arrays) -> bool:
    """Return whether two runs have the same test rows and predict the same for them, up to round-off.

    Args:
        mine: arrays of one run by name.
        theirs: arrays of the other run by name.

    Returns:
        Whether means, variances and probabilities agree in every row, in any order of the rows.
    """
    order = order_of_test_rows(mine, theirs)
    names = [name for name in _COMPARED if name in mine and name in theirs]
    return order is not None and all(_close(mine[name][order], theirs[name]) for name in names)


def _close(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0.0) <= TIE_TOLERANCE * np.abs(b).max(initial=0.0))


def _groups(first: Mapping[int, int]) -> tuple[tuple[int, ...], ...]:
    """Return the groups of more than one seed with the same first seed."""
    members: dict[int, list[int]] = {}
    for seed, representative in first.items():
        members.setdefault(representative, []).append(seed)
    return tuple(tuple(group) for group in members.values() if len(group) > 1)
