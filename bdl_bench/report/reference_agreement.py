"""The tables beside the metrics: agreement with the exact variance, and what each method cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from bdl_bench.methods import REFERENCE
from bdl_bench.metrics import Agreement, agreement
from bdl_bench.records.record import Cost
from bdl_bench.report.results import TaskResults
from bdl_bench.stats import Interval, mean_interval

__all__ = ["AgreementRow", "CostRow", "agreement_rows", "cost_rows"]


@dataclass(frozen=True)
class AgreementRow:
    """Agreement of one method with the exact variance, over seeds; `spearman` None for a constant variance."""

    method: str
    spearman: Interval | None
    mean_ratio: Interval
    relative_rmse: Interval


@dataclass(frozen=True)
class CostRow:
    """Medians over seeds: seconds to fit, to tune and to predict, passes of all three, bytes of memory, their rise.

    `exclusive` False: in at least one cell other jobs ran at the same time, so that its seconds are an upper bound.
    """

    method: str
    fit_seconds: float
    predict_seconds: float
    peak_bytes: float
    increase_bytes: float
    peak_reset: bool
    device_peak_bytes: float | None
    tuning_seconds: float | None = None
    passes: float | None = None
    exclusive: bool = True

    @property
    def total_seconds(self) -> float:
        """To fit, tune and predict."""
        return self.fit_seconds + self.predict_seconds + (self.tuning_seconds or 0.0)


def agreement_rows(results: TaskResults) -> list[AgreementRow]:
    """One row a method but the reference; none where the reference was not run."""
    rows = []
    for method in results.methods:
        seeds = results.shared_seeds(method, REFERENCE)
        if method == REFERENCE or not seeds:
            continue
        found = [_agreement(results, method, seed) for seed in seeds]
        ranks = [a.spearman for a in found if a.spearman is not None]
        rows.append(
            AgreementRow(
                method,
                mean_interval(ranks) if len(ranks) == len(found) else None,
                mean_interval([a.mean_ratio for a in found]),
                mean_interval([a.relative_rmse for a in found]),
            )
        )
    return rows


def cost_rows(results: TaskResults) -> list[CostRow]:
    """One row a method."""
    rows = []
    for method in results.methods:
        costs = [r.cost for r in results.done[method].values() if r.cost is not None]
        if costs:
            rows.append(
                CostRow(
                    method,
                    median(c.fit_seconds for c in costs),
                    median(c.predict_seconds for c in costs),
                    median(c.peak_bytes for c in costs),
                    median(c.peak_increase_bytes for c in costs),
                    all(c.peak_reset for c in costs),
                    _median_or_none(c.device_peak_bytes for c in costs),
                    _median_or_none(c.tuning_seconds for c in costs),
                    _median_or_none(_all_passes(c) for c in costs),
                    all(c.exclusive for c in costs),
                )
            )
    return rows


def _agreement(results: TaskResults, method: str, seed: int) -> Agreement:
    return agreement(*(results.arrays(name, seed)["epistemic_variance"] for name in (method, REFERENCE)))


def _all_passes(cost: Cost) -> float | None:
    """To fit, tune and predict."""
    if cost.passes is None:
        return None
    return cost.passes + (cost.predict_passes or 0.0) + (cost.tuning_passes or 0.0)


def _median_or_none(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return median(numbers) if numbers else None
