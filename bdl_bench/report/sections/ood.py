"""Out-of-distribution detection: how well a score separates out-of-distribution rows from test rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics import Metric
from bdl_bench.metrics.evaluation import ood_scores
from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.histograms import histograms
from bdl_bench.report.formatting import number
from bdl_bench.report.scores import ScoreTable
from bdl_bench.report.sections.context import Context
from bdl_bench.report.sections.scores import Scores

__all__ = ["Detection", "OutOfDistribution", "out_of_distribution"]

Floats = NDArray[np.float64]
_KEY = re.compile(r"ood/([^/]+)/(.+)/(variance|entropy)")
_SCORES = ("variance", "entropy")


@dataclass(frozen=True)
class Detection:
    """One set of rows: the columns of its table, as (metric, name, score), and its histograms."""

    name: str
    columns: list[tuple[Metric, str, str]]
    pictures: list[Picture]


@dataclass(frozen=True)
class OutOfDistribution:
    """Every set of rows; the numbers are in the tables of `scores`."""

    template: ClassVar[str] = "ood.html"
    scores: Scores
    sets: list[Detection]


def out_of_distribution(context: Context, scores: Scores) -> OutOfDistribution | None:
    """Return every out-of-distribution set, with histograms of the compared table; None if there is no such set."""
    by_set: dict[str, list[tuple[Metric, str, str]]] = {}
    found = {metric.key: metric for table in scores.tables for metric in table.columns("ood/")}
    for key, metric in found.items():
        if match := _KEY.fullmatch(key):
            by_set.setdefault(match[2], []).append((metric, match[1], match[3]))
    for columns in by_set.values():
        columns.sort(key=lambda column: _SCORES.index(column[2]))
    sets = [
        Detection(name, columns, context.render(_histograms(context, scores.compared, name)))
        for name, columns in by_set.items()
    ]
    return OutOfDistribution(scores, sets) if sets else None


def _histograms(context: Context, table: ScoreTable, name: str) -> list[Drawing]:
    """Draw one figure per score that differs between rows, of the first seed of each method."""
    drawings = []
    for score in _SCORES:
        key = f"ood/AUROC/{name}/{score}"
        found = {m: row[key] for m, row in table.entries.items() if key in row}
        if found:
            notes = {m: number(entry.interval.mean) for m, entry in found.items()}
            pairs = {m: _scores(context, table, m, name, score) for m in found}
            drawings.append(histograms(f"ood {name} {score}", f"by {score}", pairs, context.palette, note=notes))
    return drawings


def _scores(context: Context, table: ScoreTable, method: str, name: str, score: str) -> tuple[Floats, Floats]:
    results = context.results
    seed = min(results.finished[method])
    return ood_scores(results.kind, results.predictions(method, seed, tuned=table.tuned).for_metrics(), name, score)
