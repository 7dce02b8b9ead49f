"""Effects as points with intervals, one row per method: difference from the baseline, best first."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from bdl_bench.report.figures.canvas import GUIDE, INK, Drawing, blank
from bdl_bench.report.figures.labels import short
from bdl_bench.report.formatting import number
from bdl_bench.report.palette import Palette
from bdl_bench.stats import Interval, Verdict

__all__ = ["forest"]

_WIDTH, _NAMES, _RIGHT, _ROW, _BELOW = 3.5, 1.28, 0.2, 0.185, 0.42
_LONGEST = 4.0
"""Ends of intervals beyond this multiple of the median end are cut, so that a wide one does not hide the others."""


def forest(
    name: str,
    title: str,
    effects: Mapping[str, Interval],
    palette: Palette,
    *,
    verdicts: Mapping[str, Verdict],
    label: str,
    lower_is_better: bool,
    relevant: float,
) -> Drawing | None:
    """Draw the effects of the methods with their 95 % intervals.

    Args:
        name: the name of the file, without suffix.
        title: the caption.
        effects: the difference from the baseline, by method.
        palette: the styles of the methods.
        verdicts: the verdict on each method; the names of better and worse methods are bold.
        label: the label of the horizontal axis.
        lower_is_better: whether a smaller value of the metric is better.
        relevant: the smallest relevant difference, which is shaded on both sides of 0.

    Returns:
        The drawing, the best method first; None if no effect has an interval.
    """
    found = {m: e for m, e in effects.items() if e.low is not None and e.high is not None}
    if not found:
        return None
    ordered = sorted(found, key=lambda m: found[m].mean if lower_is_better else -found[m].mean)
    reach = _reach(found, relevant)
    height = _ROW * len(ordered) + _BELOW + 0.2
    with blank((_WIDTH, height)) as figure:
        axes = figure.add_axes(
            (_NAMES / _WIDTH, _BELOW / height, 1 - (_NAMES + _RIGHT) / _WIDTH, _ROW * len(ordered) / height)
        )
        axes.patch.set_visible(False)
        if relevant > 0:
            axes.axvspan(max(-relevant, -reach), min(relevant, reach), color=GUIDE, alpha=0.5, lw=0, zorder=0)
        axes.axvline(0, color=INK, lw=0.8, zorder=1)
        for row, method in enumerate(ordered):
            style, effect = palette[method], found[method]
            low, high = max(effect.low or 0.0, -reach), min(effect.high or 0.0, reach)
            axes.plot((low, high), (row, row), color=style.colour, lw=1.6, solid_capstyle="butt", zorder=2)
            for end, cut, sign in ((low, effect.low, "<"), (high, effect.high, ">")):
                if end != cut:
                    axes.plot(end, row, sign, ms=4.5, mec=style.colour, mfc="none", zorder=3, clip_on=False)
            if abs(effect.mean) <= reach:
                axes.plot(effect.mean, row, marker=style.marker, ms=4.5, color=style.colour, zorder=4)
        axes.set_xlim(-reach, reach)
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        axes.set_yticks(range(len(ordered)), [short(m) for m in ordered], fontsize=7.5)
        for tick, method in zip(axes.get_yticklabels(), ordered, strict=True):
            tick.set_color(palette[method].colour)
            tick.set_fontweight("bold" if verdicts.get(method) in ("better", "worse") else "normal")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(label)
        for x, align, word in ((-reach, "left", "better"), (reach, "right", "worse")):
            text = word if lower_is_better else {"better": "worse", "worse": "better"}[word]
            text = f"← {text}" if align == "left" else f"{text} →"
            axes.text(x, -0.65, text, ha=align, va="bottom", fontsize=7, color=INK)
    words = "; ".join(f"{m} {number(found[m].mean)} ± {number(found[m].half_width or 0.0)}" for m in ordered)
    return Drawing(name, title, f"{title}, with 95 % intervals: {words}", figure)


def _reach(found: Mapping[str, Interval], relevant: float) -> float:
    """Return the end of the axis on both sides of 0."""
    ends = sorted(max(abs(e.low or 0.0), abs(e.high or 0.0)) for e in found.values())
    reach = min(ends[-1], _LONGEST * median(ends)) if median(ends) > 0 else ends[-1]
    return (
        1.08 * max(reach, 1.5 * relevant, *(0.0, max(abs(e.mean) for e in found.values()) if len(found) < 3 else 0.0))
        or 1.0
    )
