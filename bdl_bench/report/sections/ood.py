"""Out-of-distribution detection: how well a score separates out-of-distribution rows from test rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics import Metric
from bdl_bench.metrics.evaluation import OOD_SCORES, ood_scores
from bdl_bench.report.figures.canvas import INK, SOFT, WIDE, Drawing, blank
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.labels import short
from bdl_bench.report.formatting import number
from bdl_bench.report.palette import Palette
from bdl_bench.report.scores import ScoreTable
from bdl_bench.report.sections.context import Context
from bdl_bench.report.sections.scores import Scores

__all__ = ["Detection", "OutOfDistribution", "out_of_distribution"]

Floats = NDArray[np.float64]
_KEY = re.compile(rf"ood/([^/]+)/(.+)/({'|'.join(OOD_SCORES)})")
_ROW, _NAMES, _WIDTH, _BINS = 0.3, 1.28, WIDE, 24


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
        columns.sort(key=lambda column: OOD_SCORES.index(column[2]))
    sets = [
        Detection(name, columns, context.render(_histograms(context, scores.compared, name)))
        for name, columns in by_set.items()
    ]
    return OutOfDistribution(scores, sets) if sets else None


def _histograms(context: Context, table: ScoreTable, name: str) -> list[Drawing]:
    """Draw one figure per score that differs between rows, of the first seed of each method."""
    drawings = []
    for score in OOD_SCORES:
        key = f"ood/AUROC/{name}/{score}"
        found = {m: row[key] for m, row in table.entries.items() if key in row}
        if found:
            notes = {m: number(entry.interval.mean) for m, entry in found.items()}
            pairs = {m: _scores(context, table, m, name, score) for m in found}
            drawings.append(
                histograms(f"ood {name} {score}", f"by {_words(score)}", pairs, context.palette, note=notes)
            )
    return drawings


def _words(score: str) -> str:
    return "own score" if score == "score" else score.replace("_", " ")


def _scores(context: Context, table: ScoreTable, method: str, name: str, score: str) -> tuple[Floats, Floats]:
    results = context.results
    seed = min(results.finished[method])
    return ood_scores(results.kind, results.predictions(method, seed, tuned=table.tuned).for_metrics(), name, score)


def histograms(
    name: str, title: str, scores: Mapping[str, tuple[Floats, Floats]], palette: Palette, *, note: Mapping[str, str]
) -> Drawing:
    """Draw the histograms of the ranks of (test, other) scores among both, test rows in grey, with `note` at the right.

    Ranks are shown since scores of different methods have different units, and AUROC depends on ranks alone.
    """
    rows = len(scores)
    height = _ROW * rows + 0.7
    with blank((_WIDTH, height)) as figure:
        axes = figure.add_axes((_NAMES / _WIDTH, 0.38 / height, 1 - (_NAMES + 0.62) / _WIDTH, 1 - 0.62 / height))
        edges = np.linspace(0, 1, _BINS + 1)
        for row, (method, (inside, outside)) in enumerate(scores.items()):
            base = float(rows - 1 - row)
            for values, colour, alpha in zip(
                _densities(inside, outside), (SOFT, palette[method].colour), (0.55, 0.6), strict=True
            ):
                axes.stairs(
                    base + 0.85 * values, baseline=base, edges=edges, fill=True, color=colour, alpha=alpha, lw=0
                )
            axes.text(1.02, base + 0.3, note.get(method, ""), fontsize=7, color=INK, va="center")
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.05, rows)
        axes.set_yticks(np.arange(rows) + 0.3, [short(m) for m in reversed(list(scores))], fontsize=7.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("rank of the score among both sets")
        axes.text(1.02, rows + 0.05, "AUROC", fontsize=7, color=INK, va="bottom")
    return Drawing(name, title, f"{title}: test rows against others for {', '.join(scores)}", figure)


def _densities(inside: Floats, outside: Floats) -> tuple[Floats, Floats]:
    """Return the fractions in bins of equal rank, scaled to a maximum of 1; tied scores have their mean rank."""
    both = np.concatenate([inside, outside])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[inverse] / len(both)
    edges = np.linspace(0, 1, _BINS + 1)
    found = [np.histogram(part, edges)[0] / len(part) for part in np.split(ranks, [len(inside)])]
    top = max(float(f.max()) for f in found)
    return found[0] / top, found[1] / top
