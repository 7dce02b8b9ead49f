"""Fidelity: the distance of every method from the posterior, beside the quality of its predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from scipy.stats import kendalltau

from bdl_bench.methods import POSTERIOR
from bdl_bench.metrics import METRICS
from bdl_bench.records.record import Convergence, Record
from bdl_bench.report.fidelity import FidelitySet, fidelity_sets
from bdl_bench.report.figures.canvas import GUIDE, WIDE, Drawing, Margins, log_axis, panel
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.labels import MOST_NAMES, around_points, main_range
from bdl_bench.report.formatting import join_names, number
from bdl_bench.report.palette import Palette
from bdl_bench.report.results import TaskResults
from bdl_bench.report.sections.context import Context

__all__ = ["Column", "FidelitySection", "fidelity_section"]

_MAIN_NAMES = {"w2": "W2", "total_variation": "total variation"}
_AGREES, _DISAGREES = 0.5, 0.2
"""Kendall's τ from which two orders of the methods agree, and below which they do not."""


@dataclass(frozen=True)
class Column:
    """A column of the tables: a field of `Fidelity`, its name, and how to read it."""

    field: str
    label: str
    note: str
    reading: str
    at_best: int = 0
    """The value of the posterior itself. If it is 1, the noise floor is a distance from 1."""


_COLUMNS = {
    "total_variation": Column(
        "total_variation",
        "TV ↓",
        "total variation",
        "total variation of the class probabilities: mean of ½ Σ |p − p*| over rows; 0 at best",
    ),
    "top_agreement": Column(
        "top_agreement", "top class ↑", "share", "share of rows with the same most probable class", 1
    ),
    "w2": Column(
        "w2", "W2 ↓", "of Gaussians", "mean 2-Wasserstein distance of each output, both as Gaussians; in its units"
    ),
    "mean_shift": Column(
        "mean_shift", "mean shift ↓", "|m − m*| / s*", "distance of the means in posterior standard deviations"
    ),
    "spearman": Column("spearman", "Spearman ↑", "of variances", "rank correlation of the epistemic variances", 1),
    "mean_ratio": Column("mean_ratio", "variance ratio", "1 at best", "mean of variance / posterior variance", 1),
    "relative_rmse": Column(
        "relative_rmse", "relative RMSE ↓", "of variances", "√ mean (variance / posterior variance − 1)²"
    ),
}


@dataclass(frozen=True)
class FidelitySection:
    """Tables and figures; `sets` is empty if the posterior was not reached at any seed.

    Args:
        sets: the test rows, then rows unlike the data.
        columns: columns of every table.
        sentences: who is nearest, who predicts best, and whether both orders agree.
        pictures: the first metric against the distance, one picture per set with a metric.
        gradients: ‖∇L‖ / ‖δθ‖ at the trained weights, by seed.
        convergence: how training was continued to a stationary point, by seed.
        missing: why the posterior is not known, by seed.
        seeds: the seeds of the tables.
    """

    template: ClassVar[str] = "fidelity.html"
    reference: str
    sets: list[FidelitySet]
    columns: list[Column]
    sentences: list[str]
    pictures: list[Picture]
    gradients: dict[int, float]
    convergence: dict[int, Convergence]
    missing: dict[int, str]
    seeds: list[int]


def fidelity_section(context: Context, records: Sequence[Record]) -> FidelitySection | None:
    """Return the distances from the posterior; None if no run of it is among the records.

    Args:
        context: results, styles and gallery of one task.
        records: all records, also those of skipped and failed runs.
    """
    results = context.results
    runs = [record for record in records if record.task == results.name and record.method == POSTERIOR]
    if not runs:
        return None
    sets = fidelity_sets(results, context.design)
    order = [name for name in _COLUMNS if sets and any(found.floor[name] is not None for found in sets)]
    if sets and sets[0].main == "w2":
        order.insert(0, order.pop(order.index("w2")))
    drawings = [_against_quality(context, found) for found in sets]
    trainings = {r.seed: r for seeds in results.finished.values() for r in seeds.values()}
    return FidelitySection(
        POSTERIOR,
        sets,
        [_COLUMNS[name] for name in order],
        _sentences(results, sets) if sets else [],
        context.render(drawings),
        {s: r.relative_gradient for s, r in sorted(trainings.items()) if r.relative_gradient is not None},
        {s: r.training.convergence for s, r in sorted(trainings.items()) if r.training and r.training.convergence},
        {record.seed: record.reason or record.status for record in runs if record.status != "ok"},
        sorted(results.finished.get(POSTERIOR, {})),
    )


def _sentences(results: TaskResults, sets: Sequence[FidelitySet]) -> list[str]:
    """Return one sentence on the rows near the data, and one on rows away from it, of untuned predictions."""
    near, away = sets[0], sets[1:]
    found = [_sentence("Near the data (test rows)", results, [near])]
    if away:
        names = join_names([one.name for one in away])
        found.append(_sentence(f"Away from it ({names})", results, away))
    return found


def _sentence(where: str, results: TaskResults, sets: Sequence[FidelitySet]) -> str:
    main, floor = sets[0].main, _average([found.floor[found.main] or 0.0 for found in sets])
    distances = _averages([found.untuned.distances(main) for found in sets])
    if not distances:
        return f"{where} no method finished every seed of the posterior."
    nearest = min(distances, key=lambda name: distances[name])
    equal = [m for m in distances if m != nearest and distances[m] - distances[nearest] <= floor]
    within = f"; {join_names(equal)} differ from it by less" if equal else ""
    head = (
        f"{where}, {nearest} is nearest to the posterior ({_MAIN_NAMES[main]} {number(distances[nearest])}, noise "
        f"floor {number(floor)}{within})"
    )
    label, qualities = _qualities(results, sets)
    if not qualities:
        return f"{head}. These rows have no labels to score predictions by."
    best = min(qualities, key=lambda name: qualities[name])
    tail = f"{best} has the lowest mean {label} ({number(qualities[best])})"
    return f"{head}; {tail}.{_agreement(distances, qualities, label)}"


def _agreement(distances: Mapping[str, float], qualities: Mapping[str, float], label: str) -> str:
    """Return a sentence on whether both orders of the methods agree; nothing for fewer than three methods."""
    shared = [m for m in distances if m in qualities]
    if len(shared) < 3:
        return ""
    tau = float(kendalltau([distances[m] for m in shared], [qualities[m] for m in shared]).statistic)
    if not isfinite(tau):
        return ""
    words = "agree" if tau >= _AGREES else "disagree" if tau < _DISAGREES else "agree in part"
    return f" The orders of the methods by distance and by {label} {words} (Kendall's τ {number(tau)})."


def _qualities(results: TaskResults, sets: Sequence[FidelitySet]) -> tuple[str, dict[str, float]]:
    """Return the name of the first metric, and its mean over the sets that have it by method, also of the posterior."""
    metric = METRICS[results.kind][0]
    short = metric.key.rpartition("/")[2]
    keys = [metric.key if found.key == "test" else f"shift/{short}/{found.name}" for found in sets]
    values: dict[str, list[float]] = {}
    for method in results.finished:
        found = [results.values(method, key) for key in keys]
        means = [_average(numbers) for numbers in found if numbers]
        complete = len(results.finished[method]) == len(results.seeds)
        if means and complete and all(map(isfinite, means)):
            values[method] = means
    most = max(map(len, values.values()), default=0)
    return metric.label, {m: _average(numbers) for m, numbers in values.items() if len(numbers) == most}


def _against_quality(context: Context, found: FidelitySet) -> Drawing | None:
    """Draw the first metric against the distance; None if fewer than three methods have both."""
    label, qualities = _qualities(context.results, [found])
    distances = found.untuned.distances(found.main)
    points = {m: (distances[m], qualities[m]) for m in distances if m in qualities and distances[m] > 0}
    if len(points) < 3:
        return None
    axis = f"{_MAIN_NAMES[found.main]} to the posterior, {found.name}"
    return _scatter(found, points, qualities.get(POSTERIOR), context.palette, labels=(axis, label))


def _scatter(
    found: FidelitySet,
    points: Mapping[str, tuple[float, float]],
    posterior: float | None,
    palette: Palette,
    *,
    labels: tuple[str, str],
) -> Drawing:
    floor = found.floor[found.main] or 0.0
    with panel(*labels, size=(WIDE, 2.9), margins=Margins(left=0.7)) as axes:
        x, y = [p[0] for p in points.values()], [p[1] for p in points.values()]
        low = min([*x, floor] if floor > 0 else x)
        log_axis(axes, "x", low / 1.6, max(x) * 1.8, most=60)
        heights = y if posterior is None else [*y, posterior]
        bottom, top = main_range(heights)
        room = 0.12 * ((top - bottom) or 1.0)
        axes.set_ylim(bottom - room, top + room)
        if floor > 0:
            axes.axvspan(low / 1.6, floor, color=GUIDE, alpha=0.35, lw=0, zorder=0)
        if posterior is not None:
            axes.axhline(posterior, color=GUIDE, lw=1.2, ls="--", zorder=0)
        for method, point in points.items():
            style = palette[method]
            axes.plot(*point, marker=style.marker, ms=4.5, color=style.colour, ls="", zorder=3)
        inside = {m: p for m, p in points.items() if bottom - room <= p[1] <= top + room}
        around_points(axes, {m: inside[m] for m in sorted(inside, key=inside.__getitem__)[:MOST_NAMES]}, palette)
    outside = [m for m in points if m not in inside]
    values = ", ".join(f"{m} {p[0]:.3g}" for m, p in points.items())
    title = f"{labels[1]} against {_MAIN_NAMES[found.main]}: {found.name}"
    title += f" (far outside: {join_names(outside)})" if outside else ""
    return Drawing.of(axes, f"fidelity {found.name}", title, f"{title}; distances: {values}")


def _averages(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each method that all have."""
    return {m: _average([one[m] for one in found]) for m in found[0] if all(m in one for one in found)}


def _average(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
