"""Shifted rows: a metric against the severity."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.shift import shift_figure
from bdl_bench.report.results import TaskResults
from bdl_bench.report.sections.context import Context

__all__ = ["Shift", "shift"]

_KEY = re.compile(r"shift/([^/]+)/(.+)-(\d+)")


@dataclass(frozen=True)
class Shift:
    """One picture a family of shifts and metric."""

    template: ClassVar[str] = "shift.html"
    pictures: list[Picture]
    tuned: bool


def shift(context: Context) -> Shift | None:
    """None where no record has such rows. Tuned where every method was."""
    results = context.results
    tuned = set(results.tuned_methods) == set(results.methods)
    found = _curves(results, tuned=tuned)
    drawings = [shift_figure(*place, curves, context.palette) for place, curves in sorted(found.items(), key=_family)]
    return Shift(context.show(drawings), tuned) if drawings else None


def _family(item: tuple[tuple[str, str], object]) -> str:
    return item[0][0]


def _curves(results: TaskResults, *, tuned: bool) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """`curves[family, metric][method][severity]`, means over seeds; the test rows are severity 0."""
    clean = {metric.key.rpartition("/")[2]: metric for metric in results.metrics}
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for method in results.methods:
        for key in results.measured(method, min(results.done[method]), tuned=tuned):
            match = _KEY.fullmatch(key)
            values = results.values(method, key, tuned=tuned) if match else []
            if match is None or not values or match[1] not in clean:
                continue
            metric = clean[match[1]]
            points = found.setdefault((match[2], metric.label), {}).setdefault(method, {})
            points[int(match[3])] = float(np.mean(values))
            points.setdefault(0, float(np.mean(results.values(method, metric.key, tuned=tuned))))
    return found
