"""Every number of every run in long format, also as a pandas DataFrame and as Parquet; pandas is optional."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING

from bdl_bench.methods import POSTERIOR, REFERENCE
from bdl_bench.records.record import Cost
from bdl_bench.report.fidelity import fidelity_of_run, posterior_sets
from bdl_bench.report.reference_agreement import agreement_with_reference
from bdl_bench.report.results import TaskResults
from estimators.runtime.optional import optional_module

__all__ = ["LongRow", "has_parquet", "long_rows", "to_frame", "to_parquet"]

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LongRow:
    """One number of one run. `variant` is "untuned" or "tuned"; costs and agreement are "untuned"."""

    task: str
    method: str
    seed: int
    variant: str
    quantity: str
    value: float


def long_rows(results: TaskResults) -> Iterator[LongRow]:
    """Yield the rows of one task: metrics by their keys, `fidelity/...`, then `agreement/...` and `cost/...`."""
    tuned, sets = set(results.tuned_methods), posterior_sets(results)
    for method, seeds in results.finished.items():
        for seed, record in seeds.items():
            run = (results.name, method, seed)
            for variant in (False, True) if method in tuned else (False,):
                name = "tuned" if variant else "untuned"
                for key, value in results.metric_values(method, seed, tuned=variant).items():
                    yield LongRow(*run, name, key, value)
                for key, value in _fidelity(results, method, seed, sets, tuned=variant).items():
                    yield LongRow(*run, name, key, value)
            for key, value in {**_agreement(results, method, seed), **_cost(record.cost)}.items():
                yield LongRow(*run, "untuned", key, value)


def _fidelity(results: TaskResults, method: str, seed: int, sets: list[str], *, tuned: bool) -> dict[str, float]:
    if method == POSTERIOR or seed not in results.finished.get(POSTERIOR, {}):
        return {}
    values = {key: asdict(fidelity_of_run(results, method, seed, key, tuned=tuned)) for key in sets}
    return {f"fidelity/{key}/{name}": v for key, found in values.items() for name, v in found.items() if v is not None}


def _agreement(results: TaskResults, method: str, seed: int) -> dict[str, float]:
    if method == REFERENCE or seed not in results.finished.get(REFERENCE, {}):
        return {}
    found = agreement_with_reference(results, method, seed)
    values = {"spearman": found.spearman, "mean_ratio": found.mean_ratio, "relative_rmse": found.relative_rmse}
    return {f"agreement/{name}": value for name, value in values.items() if value is not None}


def _cost(cost: Cost | None) -> dict[str, float]:
    if cost is None:
        return {}
    values = cost.model_dump(exclude={"peak_reset", "exclusive"})
    return {f"cost/{name}": float(value) for name, value in values.items() if value is not None}


def to_frame(rows: Sequence[LongRow]) -> pd.DataFrame:
    """Return columns task, method, seed, variant, quantity, value; raise UnsupportedError without pandas."""
    pandas = optional_module("pandas", purpose="make a data frame", install='"bdl-bench[notebook]"')
    columns = [field.name for field in fields(LongRow)]
    frame: pd.DataFrame = pandas.DataFrame([asdict(row) for row in rows], columns=columns)
    return frame


def has_parquet() -> bool:
    """Return whether pandas and pyarrow are installed."""
    return find_spec("pandas") is not None and find_spec("pyarrow") is not None


def to_parquet(rows: Sequence[LongRow]) -> bytes:
    """Return the content of a Parquet file; pandas and pyarrow must be installed."""
    buffer = io.BytesIO()
    to_frame(rows).to_parquet(buffer, engine="pyarrow", index=False)
    return buffer.getvalue()
