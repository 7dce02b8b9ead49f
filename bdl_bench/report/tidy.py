"""Every number of every cell in long format: one row a task, method, seed, variant and quantity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bdl_bench.methods import REFERENCE
from bdl_bench.metrics import agreement
from bdl_bench.records.record import Cost
from bdl_bench.report.results import TaskResults

__all__ = ["LongRow", "long_rows"]


@dataclass(frozen=True)
class LongRow:
    """`variant` is "as fitted" or "tuned"; costs and agreement are "as fitted"."""

    task: str
    method: str
    seed: int
    variant: str
    quantity: str
    value: float


def long_rows(results: TaskResults) -> Iterator[LongRow]:
    """The rows of one task: metrics under their keys, then `agreement/...` and `cost/...`."""
    tuned = set(results.tuned_methods)
    for method, seeds in results.done.items():
        for seed, record in seeds.items():
            place = (results.name, method, seed)
            for variant in (False, True) if method in tuned else (False,):
                name = "tuned" if variant else "as fitted"
                for key, value in results.measured(method, seed, tuned=variant).items():
                    yield LongRow(*place, name, key, value)
            for key, value in {**_agreement(results, method, seed), **_cost(record.cost)}.items():
                yield LongRow(*place, "as fitted", key, value)


def _agreement(results: TaskResults, method: str, seed: int) -> dict[str, float]:
    if method == REFERENCE or seed not in results.done.get(REFERENCE, {}):
        return {}
    found = agreement(*(results.arrays(name, seed)["epistemic_variance"] for name in (method, REFERENCE)))
    values = {"spearman": found.spearman, "mean_ratio": found.mean_ratio, "relative_rmse": found.relative_rmse}
    return {f"agreement/{name}": value for name, value in values.items() if value is not None}


def _cost(cost: Cost | None) -> dict[str, float]:
    if cost is None:
        return {}
    values = cost.model_dump(exclude={"peak_reset", "exclusive"})
    return {f"cost/{name}": float(value) for name, value in values.items() if value is not None}
