"""Tables of agreement with linearized Laplace and of costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from bdl_bench.methods import REFERENCE
from bdl_bench.metrics import Agreement, agreement
from bdl_bench.records.record import Cost
from bdl_bench.report.results import TaskResults
from bdl_bench.report.seed_design import SeedDesign
from bdl_bench.stats import Interval, mean_interval

__all__ = ["AgreementRow", "CostRow", "agreement_rows", "agreement_with_reference", "cost_rows"]


@dataclass(frozen=True)
class AgreementRow:
    """Agreement of one method with linearized Laplace, over seeds; `spearman` is None for a constant variance."""

    method: str
    spearman: Interval | None
    mean_ratio: Interval
    relative_rmse: Interval


@dataclass(frozen=True)
class CostRow:
    """Medians over seeds: seconds to fit, tune and predict, epoch equivalents of all three, and bytes of memory.

    `seconds_range` and `passes_range` are the smallest and largest totals over seeds. If `exclusive` is False,
    other jobs ran at the same time as at least one run, and its seconds are an upper bound.
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
    seconds_range: tuple[float, float] | None = None
    passes_range: tuple[float, float] | None = None

    @property
    def total_seconds(self) -> float:
        """Seconds to fit, tune and predict."""
        return self.fit_seconds + self.predict_seconds + (self.tuning_seconds or 0.0)


def agreement_rows(results: TaskResults, design: SeedDesign) -> list[AgreementRow]:
    """Return one row per method other than the reference, over distinct seeds; none if the reference was not run."""
    rows = []
    for method in results.methods:
        seeds = design.distinct(results.shared_seeds(method, REFERENCE), [method, REFERENCE])
        if method == REFERENCE or not seeds:
            continue
        found = [agreement_with_reference(results, method, seed) for seed in seeds]
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
    """Return one row per method."""
    rows = []
    for method in results.methods:
        costs = [r.cost for r in results.finished[method].values() if r.cost is not None]
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
                    _median_or_none(_total_passes(c) for c in costs),
                    all(c.exclusive for c in costs),
                    _range(c.total_seconds for c in costs),
                    _range(_total_passes(c) for c in costs),
                )
            )
    return rows


def agreement_with_reference(results: TaskResults, method: str, seed: int) -> Agreement:
    """Return the agreement of the epistemic variances of a run with those of the reference at the same seed."""
    return agreement(*(results.arrays(name, seed)["epistemic_variance"] for name in (method, REFERENCE)))


def _total_passes(cost: Cost) -> float | None:
    """Return the epoch equivalents of fit, tuning and prediction."""
    if cost.passes is None:
        return None
    return cost.passes + (cost.predict_passes or 0.0) + (cost.tuning_passes or 0.0)


def _range(values: Iterable[float | None]) -> tuple[float, float] | None:
    numbers = [value for value in values if value is not None]
    return (min(numbers), max(numbers)) if numbers else None


def _median_or_none(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return median(numbers) if numbers else None
