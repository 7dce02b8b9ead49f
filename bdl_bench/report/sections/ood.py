"""Out-of-distribution rows: how well a score tells them from test rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.histograms import histograms
from bdl_bench.report.results import TaskResults
from bdl_bench.report.sections.context import Context
from bdl_bench.report.text import number
from bdl_bench.stats import Interval, mean_interval

__all__ = ["Detection", "OutOfDistribution", "out_of_distribution"]

Floats = NDArray[np.float64]
_KEY = re.compile(r"ood/(AUROC|AUPR|FPR95)/(.+)/(variance|entropy)")
SCORES = ("variance", "entropy")
COLUMNS = ("AUROC", "AUPR", "FPR95")


@dataclass(frozen=True)
class Detection:
    """One set of rows: `table[method][score, metric]`, and the histograms."""

    name: str
    table: dict[str, dict[tuple[str, str], Interval]]
    best: dict[tuple[str, str], str]
    pictures: list[Picture]


@dataclass(frozen=True)
class OutOfDistribution:
    """Every set."""

    template: ClassVar[str] = "ood.html"
    scores: ClassVar[tuple[str, ...]] = SCORES
    columns: ClassVar[tuple[str, ...]] = COLUMNS
    sets: list[Detection]
    tuned: bool


def out_of_distribution(context: Context) -> OutOfDistribution | None:
    """None where no record has such rows. Tuned where every method was."""
    results = context.results
    tuned = set(results.tuned_methods) == set(results.methods)
    names = list(dict.fromkeys(n for m in results.methods for n in _sets(results, m, tuned=tuned)))
    sets = [_detection(context, name, tuned=tuned) for name in names]
    return OutOfDistribution(sets, tuned) if sets else None


def _sets(results: TaskResults, method: str, *, tuned: bool) -> list[str]:
    seed = min(results.done[method])
    found = results.predictions(method, seed, tuned=tuned)
    return [name for name in found.sets("ood") if "epistemic_variance" in found.under(f"ood/{name}")]


def _detection(context: Context, name: str, *, tuned: bool) -> Detection:
    results = context.results
    table: dict[str, dict[tuple[str, str], Interval]] = {}
    for method in results.methods:
        row: dict[tuple[str, str], Interval] = {}
        for key in results.measured(method, min(results.done[method]), tuned=tuned):
            match = _KEY.fullmatch(key)
            values = results.values(method, key, tuned=tuned) if match and match[2] == name else []
            if match and values:
                row[match[3], match[1]] = mean_interval(values)
        if row:
            table[method] = row
    drawings = [_histogram(context, name, score, table, tuned=tuned) for score in SCORES]
    return Detection(name, table, _best(table), context.show(drawings))


def _best(table: Mapping[str, Mapping[tuple[str, str], Interval]]) -> dict[tuple[str, str], str]:
    """The method with the best mean of each column."""
    columns = {column for row in table.values() for column in row}
    found = {}
    for column in columns:
        sign = 1 if column[1] == "FPR95" else -1
        having = [m for m, row in table.items() if column in row]
        found[column] = min(having, key=lambda m: sign * table[m][column].mean)
    return found


def _histogram(
    context: Context, name: str, score: str, table: Mapping[str, Mapping[tuple[str, str], Interval]], *, tuned: bool
) -> Drawing | None:
    results = context.results
    pairs: dict[str, tuple[Floats, Floats]] = {}
    for method in results.methods:
        predictions = results.predictions(method, min(results.done[method]), tuned=tuned)
        pair = _score(score, predictions), _score(score, predictions.under(f"ood/{name}"))
        if pair[0] is not None and pair[1] is not None and np.ptp(np.concatenate(pair)) > 0:
            pairs[method] = (pair[0], pair[1])
    notes = {m: number(row[score, "AUROC"].mean) for m, row in table.items() if (score, "AUROC") in row}
    if not pairs:
        return None
    return histograms(f"ood {name} {score}", f"by {score}", pairs, context.palette, note=notes)


def _score(name: str, arrays: Mapping[str, NDArray[Any]]) -> Floats | None:
    """One number a row: the mean epistemic variance of the outputs, or the entropy of the predicted classes."""
    if name == "variance":
        return arrays["epistemic_variance"].mean(-1) if "epistemic_variance" in arrays else None
    if "probs" not in arrays:
        return None
    p = arrays["probs"]
    p = np.stack([p, 1 - p], axis=-1).reshape(len(p), -1) if p.shape[-1] == 1 else p
    logs = np.log(np.where(p > 0, p, 1.0))
    return np.asarray(-(p * logs).sum(-1), dtype=np.float64)
