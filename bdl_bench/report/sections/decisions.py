"""Decisions by queries: learning curves of active learning and regret of Bayesian optimisation, with tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bdl_bench.report.figures.canvas import INK, SOFT, Drawing, Margins, panel
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.labels import short
from bdl_bench.report.formatting import join_names, number
from bdl_bench.report.palette import Palette
from bdl_bench.report.sections.context import Context
from bdl_bench.report.sections.decision_runs import Curves, Floats, decision_curves, decision_values
from bdl_bench.stats import Interval, Verdict, intervals_over_seeds, mean_interval, verdicts

__all__ = ["Decisions", "Gain", "decisions"]


@dataclass(frozen=True)
class Gain:
    """What a method gains over other queries: the interval of the difference of areas, and the verdict on it."""

    interval: Interval
    verdict: Verdict


@dataclass(frozen=True)
class Decisions:
    """Curves and gains of active learning or Bayesian optimisation.

    Args:
        title: the heading.
        note: how to read the figures.
        keys: of the metrics of the last table, without the gains.
        sentences: whether random queries are significantly worse, and which methods are best.
        header: names of the gains, with what they are over.
        gains: of each method by its metric, methods in the order of their area, those with missing seeds last.
        pictures: one per method.
    """

    template: ClassVar[str] = "decisions.html"
    title: str
    note: str
    keys: tuple[str, ...]
    sentences: list[str]
    header: dict[str, str]
    gains: dict[str, dict[str, Gain]]
    pictures: list[Picture]


@dataclass(frozen=True)
class _Kind:
    """What a task with queries shows: its curve, its metrics, the curves beside it, and words."""

    title: str
    keys: tuple[str, ...]
    """Metrics of the curve, that of its area first."""
    curve: str
    y_label: Callable[[str], str]
    others: Mapping[str, str]
    """Names of other curves in the arrays, with what they are called."""
    gains: Mapping[str, str]
    """Metrics of the gain, with what it is over. The first is that over random queries."""
    note: str


_LEARNING = _Kind(
    "Decisions: active learning",
    ("al/area", "al/NLL-area"),
    "error",
    lambda kind: "RMSE" if kind == "regression" else "error rate",
    {"random_error": "random"},
    {"al/gain": "random", "al/NLL-gain": "random, by NLL", "al/network-gain": "random, of the network alone"},
    "Test error against the number of labelled rows: of each method with the rows that it chose (colour), and of the "
    "same method with random rows (grey, dashed). Means over seeds with 95 % intervals. The random rows of a seed are "
    "the same for every method. A gain is the mean over the curve of the error with random rows minus that with "
    "chosen rows; in the last column the trained network alone predicts, so that only the chosen rows differ. Other "
    "sections, also times, are of the last round.",
)
_SEARCH = _Kind(
    "Decisions: Bayesian optimisation",
    ("bo/area", "bo/regret"),
    "regret",
    lambda kind: "regret",  # noqa: ARG005
    {"random_regret": "random", "greedy_regret": "greedy"},
    {"bo/gain": "random", "bo/greedy-gain": "greedy"},
    "Regret against the number of labelled rows: the best target of the pool minus the best one found, in the unit of "
    "the target. Colour: queries of the method by expected improvement. Grey, dashed: random queries. Dotted: greedy "
    "queries, the row with the best mean of the trained network, without any variance. Means over seeds with 95 % "
    "intervals. Random and greedy queries of a seed are the same for every method. A gain is the mean regret of the "
    "other queries minus that of the method. All other sections, also times, are of the fit after the last query.",
)
_DASHES = {"random": "--", "greedy": ":"}


def decisions(context: Context) -> Decisions | None:
    """Return the section of a task with queries: active learning or Bayesian optimisation.

    Args:
        context: results, styles and gallery of one task.

    Returns:
        The section; None for a task without queries.
    """
    results = context.results
    for kind in (_LEARNING, _SEARCH):
        methods = [m for m in results.methods if results.values(m, kind.keys[0])]
        if methods:
            return _of_queries(context, kind, methods)
    return None


def _of_queries(context: Context, kind: _Kind, methods: Sequence[str]) -> Decisions:
    areas = {m: float(np.mean(decision_values(context, m, kind.keys[0]))) for m in methods}
    complete = context.results.complete_methods  # a method with missing seeds is not called the best
    ordered = sorted(methods, key=lambda m: (m not in complete, areas[m]))
    gains: dict[str, dict[str, Gain]] = {m: {} for m in ordered}
    for key in kind.gains:
        found = {m: mean_interval(decision_values(context, m, key)) for m in ordered}
        for method, verdict in verdicts(found, "higher").items():
            gains[method][key] = Gain(found[method], verdict)
    curves = {m: decision_curves(context, m, (kind.curve, *kind.others)) for m in ordered}
    labels = {m: decision_curves(context, m, ("labels",))["labels"][0] for m in ordered}
    top = max(float(values.mean(0).max()) for found in curves.values() for values in found.values())
    drawings = [
        _curve_figure(
            m, labels[m], curves[m], kind, context.palette, kind.y_label(context.results.kind), 1.15 * top or 1.0
        )
        for m in ordered
    ]
    sentences = [*_against_random(kind, ordered, gains, areas), *_against_others(kind, gains)]
    return Decisions(kind.title, kind.note, kind.keys, sentences, dict(kind.gains), gains, context.render(drawings))


def _against_random(
    kind: _Kind, ordered: Sequence[str], gains: Mapping[str, Mapping[str, Gain]], areas: Mapping[str, float]
) -> list[str]:
    """Return whether random queries are significantly worse: for the best method, then for all."""
    key, best = next(iter(kind.gains)), ordered[0]
    found, n = gains[best][key], gains[best][key].interval.n
    verdict = {
        "better": "Random queries are significantly worse",
        "worse": "Random queries are significantly better",
        "no significant difference": "Random queries are not significantly worse",
        "unknown": "Random queries are not tested, since the seeds are too few",
    }[found.verdict]
    n_tests = sum(gains[m][key].interval.p_value is not None for m in ordered)
    tests = f", corrected for {n_tests} methods" if n_tests > 1 else ""
    sentences = [
        f"Best mean {kind.curve} over the curve: {best} ({number(areas[best])}). {verdict}: gain "
        f"{_shown(found.interval)} ({n} seed{'' if n == 1 else 's'}, paired{tests})."
    ]
    by = {
        v: [m for m in ordered if gains[m][key].verdict == v] for v in ("better", "no significant difference", "worse")
    }
    words = {
        "better": "better than random queries",
        "no significant difference": "not significantly different from random queries",
        "worse": "worse than random queries",
    }
    parts = [f"{words[v]}: {join_names(names)}" for v, names in by.items() if names]
    return [*sentences, *([f"Queries of all methods, by the gain: {'; '.join(parts)}."] if parts else [])]


def _against_others(kind: _Kind, gains: Mapping[str, Mapping[str, Gain]]) -> list[str]:
    """Return which methods are better or worse than greedy queries; nothing for a task without these."""
    if "greedy" not in kind.gains.values():
        return []
    key = next(key for key, name in kind.gains.items() if name == "greedy")
    better = [m for m, found in gains.items() if found[key].verdict == "better"]
    worse = [m for m, found in gains.items() if found[key].verdict == "worse"]
    if all(found[key].verdict == "unknown" for found in gains.values()):
        return ["Greedy queries are not tested, since the seeds are too few."]
    if not better and not worse:
        return ["No method is significantly different from greedy queries, which use no variance."]
    parts = [f"better: {join_names(better)}"] if better else []
    parts += [f"worse: {join_names(worse)}"] if worse else []
    return [f"Significantly different from greedy queries, which use no variance: {'; '.join(parts)}."]


def _shown(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return number(interval.mean)
    return f"{number(interval.mean)} [{number(interval.low)}, {number(interval.high)}]"


def _curve_figure(
    method: str, labels: Floats, curves: Curves, kind: _Kind, palette: Palette, y_label: str, top: float
) -> Drawing:
    """Draw the curve of a method and those beside it, with bands of 95 % intervals over seeds."""
    style = palette[method]
    with panel("labelled rows", y_label, size=(2.7, 2.2), margins=Margins(left=0.5)) as axes:
        shown = [
            (curves[name], SOFT if words == "random" else INK, _DASHES[words]) for name, words in kind.others.items()
        ]
        for values, colour, dash in [*shown, (curves[kind.curve], style.colour, "-")]:
            mean, low, high = _band(values)
            axes.fill_between(labels, low, high, color=colour, alpha=0.16, lw=0)
            axes.plot(labels, mean, color=colour, ls=dash, lw=1.4)
        lines = [
            (short(method, 22), style.colour),
            *((w, c) for w, (_, c, _) in zip(kind.others.values(), shown, strict=True)),
        ]
        for index, (words, colour) in enumerate(lines):
            axes.text(
                0.97,
                0.97 - 0.09 * index,
                words,
                transform=axes.transAxes,
                ha="right",
                va="top",
                fontsize=7,
                color=colour,
            )
        axes.set_xlim(float(labels[0]), float(labels[-1]))
        axes.set_ylim(0, top)
    ends = ", ".join(f"{words} {number(float(curves[name][:, -1].mean()))}" for name, words in kind.others.items())
    last = number(float(curves[kind.curve][:, -1].mean()))
    words = f"{y_label} of {method} against labelled rows; at the end {last}, {ends}"
    return Drawing.of(axes, f"{kind.curve} {method}", method, words)


def _band(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Return mean and ends of the 95 % interval at each round; the mean three times for one seed."""
    found = intervals_over_seeds([row[None] for row in values], same_rows=False)
    mean, low, high = (
        np.array([i.mean if (end := getattr(i, name)) is None else end for i in found])
        for name in ("mean", "low", "high")
    )
    return mean, low, high
