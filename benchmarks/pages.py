"""The pages of docs/benchmarks: the rows of each page, their measurements, and the functions that write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.core import page as core_page
from benchmarks.core.measure import ROWS
from benchmarks.core.measure import measure as measure_core
from benchmarks.fisher import page as fisher_page
from benchmarks.fisher.measure import CASES, measure_fisher
from benchmarks.large import page as large_page
from benchmarks.large.measure import measure as measure_large
from benchmarks.large.methods import METHODS
from benchmarks.large.models import MODELS
from benchmarks.quality import page as quality_page
from benchmarks.quality.measure import measure_quality
from benchmarks.quality.networks import NETWORKS
from benchmarks.records import Measured
from benchmarks.reference import page as reference_page
from benchmarks.reference.measure import HARD_CASES, measure_hard_case, measure_reference, measure_two_runs
from benchmarks.reference.measure import TASK_NAMES as REFERENCE_TASKS
from benchmarks.regvar import exponents, memory, step
from benchmarks.regvar import page as regvar_page
from benchmarks.regvar.step_memory import measure_step_memory
from benchmarks.serving import page as serving_page
from benchmarks.serving.measure import METHODS as SERVED_FITS
from benchmarks.serving.measure import NETWORKS as SERVED
from benchmarks.serving.measure import measure_serving
from benchmarks.statistics import page as statistics_page
from benchmarks.statistics.measure import measure_columns, measure_level, measure_power
from benchmarks.statistics.worlds import DESIGNS, QUANTITIES
from benchmarks.tolerance import page as tolerance_page
from benchmarks.tolerance.measure import TASK_NAMES, measure_tolerance

__all__ = ["PAGES", "Page"]


@dataclass(frozen=True)
class Page:
    """The rows of a page by name. A page with `default` is measured without arguments."""

    rows: dict[str, Callable[[], Measured]]
    to_markdown: Callable[[dict[str, Measured]], str]
    default: bool = True


def _numbered(
    prefix: str, names: dict[str, object], measure: Callable[[str], Measured]
) -> dict[str, Callable[[], Measured]]:
    return {f"{prefix}-{i}": partial(measure, name) for i, name in enumerate(names)}


PAGES: dict[str, Page] = {
    "core": Page({name: partial(measure_core, name) for name in ROWS}, core_page.to_markdown),
    "regvar": Page(
        {
            **_numbered("step", dict(step.MODELS), step.measure_step),
            "step-memory": measure_step_memory,
            **_numbered("memory", dict(memory.SOLVERS), memory.measure_memory),
            **_numbered("exponents", dict(exponents.SOLVERS), exponents.measure_exponents),
        },
        regvar_page.to_markdown,
    ),
    "tolerance": Page(
        {
            tolerance_page.name_of(task, seed): partial(measure_tolerance, task, seed)
            for task in TASK_NAMES
            for seed in tolerance_page.SEEDS
        },
        tolerance_page.to_markdown,
        default=False,
    ),
    "reference": Page(
        {
            **{
                reference_page.name_of(task, seed): partial(measure_reference, task, seed)
                for seed in reference_page.SEEDS
                for task in REFERENCE_TASKS
            },
            **{reference_page.two_runs_name_of(task): partial(measure_two_runs, task) for task in REFERENCE_TASKS},
            **{reference_page.hard_name_of(task): partial(measure_hard_case, task) for task in HARD_CASES},
        },
        reference_page.to_markdown,
        default=False,
    ),
    "quality": Page(
        {
            quality_page.name_of(network, delta, seed): partial(measure_quality, network, delta, seed)
            for network in NETWORKS
            for delta in quality_page.DELTAS
            for seed in quality_page.SEEDS
        },
        quality_page.to_markdown,
        default=False,
    ),
    "serving": Page(
        {
            f"serving-{network}-{method}": partial(measure_serving, network, method)
            for network in SERVED
            for method in SERVED_FITS
        },
        serving_page.to_markdown,
        default=False,
    ),
    "statistics": Page(
        {
            **{
                f"statistics-{d}-{q}": partial(measure_level, design.name, quantity)
                for d, design in enumerate(DESIGNS)
                for q, quantity in enumerate(QUANTITIES)
            },
            "statistics-columns": measure_columns,
            **{
                f"statistics-power-{d}-{q}": partial(measure_power, DESIGNS[d].name, quantity)
                for d in (0, 1)
                for q, quantity in enumerate(("Gaussian scores", "heavy-tailed scores (NLL)"))
            },
        },
        statistics_page.to_markdown,
        default=False,
    ),
    "fisher": Page({name: partial(measure_fisher, name) for name in CASES}, fisher_page.to_markdown, default=False),
    "large": Page(
        {
            f"{model}-{method}": partial(measure_large, model, method)
            for model in MODELS
            for method in (large_page.REFERENCE, *METHODS)
        },
        large_page.to_markdown,
        default=False,
    ),
}
