"""Decisions: effects of interventions on the training set on both parts of the uncertainty, with tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import ClassVar, Literal

import numpy as np

from bdl_bench.report.figures.canvas import SOFT, Drawing, Margins, log_axis, panel
from bdl_bench.report.figures.gallery import Picture
from bdl_bench.report.figures.labels import beside_ends
from bdl_bench.report.formatting import join_names, number
from bdl_bench.report.palette import Palette
from bdl_bench.report.sections.context import Context
from bdl_bench.report.sections.decision_runs import Curves, decision_curves, decision_values
from bdl_bench.stats import Interval, Verdict, mean_interval, verdicts

__all__ = ["Effect", "Effects", "as_expected", "effect_words", "interventions"]

_NOT_TESTED = "not tested"
_UNCHANGED = 2.0
"""Factor within which, and within whose inverse, an interval must lie to count as unchanged."""

Direction = Literal["falls", "does not change", "rises"]
_EFFECTS: dict[str, tuple[str, Direction]] = {
    "dis/epistemic-size": ("epistemic, more training rows", "falls"),
    "dis/aleatoric-size": ("aleatoric, more training rows", "does not change"),
    "dis/epistemic-noise": ("epistemic, more label noise", "does not change"),
    "dis/aleatoric-noise": ("aleatoric, more label noise", "rises"),
}


@dataclass(frozen=True)
class Effect:
    """The factor by which an intervention changes one part of the uncertainty, its interval, and what that means."""

    factor: float
    low: float | None
    high: float | None
    found: str
    as_expected: bool | None


@dataclass(frozen=True)
class Effects:
    """Effects of interventions.

    Args:
        note: how to read the table.
        sentences: which methods behave as expected.
        header: the four effects by key, with what is expected.
        rows: effects of each method by key.
        pictures: both parts against both interventions.
    """

    template: ClassVar[str] = "interventions.html"
    note: str
    sentences: list[str]
    header: dict[str, tuple[str, str]]
    rows: dict[str, dict[str, Effect]]
    pictures: list[Picture]


def interventions(context: Context) -> Effects | None:
    """Return the section of a task with interventions on its training set.

    Args:
        context: results, styles and gallery of one task.

    Returns:
        The section; None for a task without interventions.
    """
    methods = [m for m in context.results.methods if context.results.values(m, "dis/epistemic-size")]
    return _of_interventions(context, methods) if methods else None


def _of_interventions(context: Context, methods: Sequence[str]) -> Effects:
    intervals = {(m, key): mean_interval(decision_values(context, m, key)) for m in methods for key in _EFFECTS}
    found = verdicts(intervals, "lower")
    rows = {m: {key: _effect(intervals[m, key], found[m, key], _EFFECTS[key][1]) for key in _EFFECTS} for m in methods}
    pictures = context.render(_effect_figures(context, methods))
    return Effects(_effects_note(context), _on_effects(rows), dict(_EFFECTS), rows, pictures)


def _effect(interval: Interval, verdict: Verdict, expected: Direction) -> Effect:
    words: dict[Verdict, str] = {
        "better": "falls",
        "worse": "rises",
        "no significant difference": "no significant change",
        "unknown": _NOT_TESTED,
    }
    low, high = (None if end is None else exp(end) for end in (interval.low, interval.high))
    found = words[verdict]
    return Effect(exp(interval.mean), low, high, found, as_expected(found, expected, low, high))


def as_expected(found: str, expected: Direction, low: float | None, high: float | None) -> bool | None:
    """Return whether a change is as expected; None if it was not tested, or is not known well enough.

    Args:
        found: "falls", "rises", "no significant change" or "not tested".
        expected: what is expected. Unchanged is an interval within ½ and 2, also of a significant change.
        low: lower end of the interval of the factor.
        high: upper end.

    Returns:
        Whether it is.
    """
    if found == _NOT_TESTED or low is None or high is None:
        return None
    if expected != "does not change":
        return None if found == "no significant change" else found == expected
    if low >= 1 / _UNCHANGED and high <= _UNCHANGED:
        return True
    return None if found == "no significant change" else False


def effect_words(effect: Effect) -> str:
    """Return the factor with its interval, such as "× 0.50 [0.40, 0.60]"."""
    interval = "" if effect.low is None or effect.high is None else f" [{number(effect.low)}, {number(effect.high)}]"
    return f"× {number(effect.factor)}{interval}"


def _on_effects(rows: Mapping[str, Mapping[str, Effect]]) -> list[str]:
    if all(effect.found == _NOT_TESTED for row in rows.values() for effect in row.values()):
        return ["The effects are not tested, since the seeds are too few."]
    clean = [m for m, row in rows.items() if all(effect.as_expected for effect in row.values())]
    first = (
        f"All four effects as expected: {join_names(clean)}."
        if clean
        else "No method has all four effects as expected."
    )
    counts = [
        f"{words} {expected}: {sum(bool(row[key].as_expected) for row in rows.values())} of {len(rows)} methods"
        for key, (words, expected) in _EFFECTS.items()
    ]
    return [first, f"{'; '.join(counts)}."]


def _effects_note(context: Context) -> str:
    parts = (
        "Epistemic: the variance of the outputs. Aleatoric: the noise variance with the largest likelihood of the "
        "validation rows, given mean and epistemic variance of the method; at least the standard error of their mean "
        "squared error, below which no noise can be distinguished from none."
        if context.results.kind == "regression"
        else "Epistemic: mutual information between label and function. Aleatoric: expected entropy of the label."
    )
    return (
        f"{parts} Both are means over the test rows. Factors compare the last level with the first: geometric means "
        "over seeds with 95 % intervals, and t-tests of their logarithms, corrected (Holm) for methods and effects. "
        "✓ as expected, ✗ significantly otherwise, no mark: not known. Unchanged: an interval within ½ and 2, "
        "also if the change is significant. "
        "Figures: values relative to the first level."
    )


def _effect_figures(context: Context, methods: Sequence[str]) -> list[Drawing]:
    names = (
        "sizes",
        "noise_levels",
        *(f"{by}_{part}" for by in ("size", "noise") for part in ("epistemic", "aleatoric")),
    )
    curves = {m: decision_curves(context, m, names) for m in methods}
    drawings = []
    for by, levels, x_label in (("size", "sizes", "training rows"), ("noise", "noise_levels", "label noise")):
        relative = {
            part: {m: np.exp(np.log(c[f"{by}_{part}"] / c[f"{by}_{part}"][:, :1]).mean(0)) for m, c in curves.items()}
            for part in ("epistemic", "aleatoric")
        }
        values = np.concatenate([line for lines in relative.values() for line in lines.values()])
        limits = 0.9 * float(values.min()), 1.1 * float(values.max())
        for part, lines in relative.items():
            x = {m: c[levels][0] for m, c in curves.items()}
            drawings.append(_effect_figure(f"{part}, {x_label}", x, lines, x_label, limits, context.palette))
    return drawings


def _effect_figure(
    title: str, levels: Curves, lines: Curves, x_label: str, limits: tuple[float, float], palette: Palette
) -> Drawing:
    """Draw one part of the uncertainty, relative to the first level, against the levels of one intervention."""
    height = max(2.4, 0.135 * len(lines) + 0.7)
    with panel(x_label, "factor", size=(4.2, height), margins=Margins(left=0.58, right=1.52)) as axes:
        first = next(iter(levels.values()))
        axes.axhline(1.0, color=SOFT, lw=0.8, ls=":")
        if first[0] > 0:
            axes.set_xscale("log")
        for method, values in lines.items():
            style = palette[method]
            axes.plot(levels[method], values, color=style.colour, ls=style.dash, lw=1.3)
        axes.set_xlim(float(first[0]), float(first[-1]))
        axes.set_xticks(first, [f"{level:g}" for level in first])
        axes.minorticks_off()
        log_axis(axes, "y", *limits)
        beside_ends(axes, {m: (float(levels[m][-1]), float(v[-1])) for m, v in lines.items()}, palette)
    ends = ", ".join(f"{m} × {number(float(v[-1]))}" for m, v in lines.items())
    return Drawing.of(axes, title, title, f"{title}; at the last level relative to the first: {ends}")
