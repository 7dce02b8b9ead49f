"""Distribution shift: metrics against the severity of the shift."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bdl_bench.report.figures.canvas import WIDE, Drawing, Margins, panel
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.labels import beside_ends
from bdl_bench.report.palette import Palette
from bdl_bench.report.results import TaskResults
from bdl_bench.report.sections.context import Context

__all__ = ["Shift", "shift"]

_KEY = re.compile(r"shift/([^/]+)/(.+)-(\d+)")
Curves = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Shift:
    """One figure per family of shifts and metric."""

    template: ClassVar[str] = "shift.html"
    pictures: list[Picture]
    tuned: bool


def shift(context: Context) -> Shift | None:
    """Return the figures, tuned if every method was tuned; None if no record has shifted rows."""
    results = context.results
    tuned = results.all_tuned
    found = _curves(results, tuned=tuned)
    by_family = sorted(found.items(), key=lambda item: item[0][0])
    drawings = [shift_figure(*names, curves, context.palette) for names, curves in by_family]
    return Shift(context.render(drawings), tuned) if drawings else None


def _curves(results: TaskResults, *, tuned: bool) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """Return means over seeds, `curves[family, metric][method][severity]`; severity 0 is the test rows."""
    unshifted = {metric.key.rpartition("/")[2]: metric for metric in results.metrics}
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for method in results.methods:
        for key in results.metric_values(method, min(results.finished[method]), tuned=tuned):
            match = _KEY.fullmatch(key)
            values = results.values(method, key, tuned=tuned) if match else []
            if match is None or not values or match[1] not in unshifted:
                continue
            metric = unshifted[match[1]]
            points = found.setdefault((match[2], metric.label), {}).setdefault(method, {})
            points[int(match[3])] = float(np.mean(values))
            points.setdefault(0, float(np.mean(results.values(method, metric.key, tuned=tuned))))
    return found


def shift_figure(family: str, metric: str, curves: Curves, palette: Palette) -> Drawing:
    """Draw means over seeds, one line per method with its name at its end."""
    height = max(2.4, 0.135 * len(curves) + 0.7)
    with panel("severity", metric, size=(WIDE, height), margins=Margins(left=0.58, right=1.4)) as axes:
        for method, points in curves.items():
            style = palette[method]
            severities = sorted(points)
            axes.plot(severities, [points[s] for s in severities], color=style.colour, ls=style.dash, lw=1.3)
        severities = sorted({s for points in curves.values() for s in points})
        axes.set_xticks(severities, ["test" if s == 0 else str(s) for s in severities])
        axes.set_xlim(severities[0], severities[-1])
        beside_ends(axes, {m: (max(p), p[max(p)]) for m, p in curves.items()}, palette)
    ends = ", ".join(f"{m} {p[max(p)]:.3g}" for m, p in curves.items())
    words = f"{metric} against the severity of {family}; at the highest: {ends}"
    return Drawing.of(axes, f"shift {family} {metric}", f"{family}: {metric}", words)
