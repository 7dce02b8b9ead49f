"""The table and the figures of simulation-based calibration."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from bdl_bench.markdown import markdown_table
from bdl_bench.verify.plot import STYLE, to_bytes
from bdl_bench.verify.sbc.run import SbcResult
from bdl_bench.verify.sbc.summary import LEVELS, SbcSummary, simultaneous_band
from estimators.persistence.atomic import write_bytes, write_text

__all__ = ["HEADER", "sbc_figure", "table_rows", "to_markdown", "write_sbc"]

HEADER = (
    "case",
    "method",
    "ranked by",
    "replications",
    "KS p, f",
    "KS distance, f",
    "KS p, log-likelihood",
    *(f"coverage at {level:.0%}" for level in LEVELS),
    "spread",
    "ranks",
)
_LEGEND = """In each replication, weights are drawn from the prior and targets from the network; each method is
fitted to them (Talts et al. 2018). If a method has the posterior, the ranks of the true f(x*) are uniform. *KS*:
test of uniform ranks, with one random output at one random query per replication; the log-likelihood of the
training data is a second test quantity, which also detects a method that ignores the data (Modrák et al. 2023).
*Coverage*: of central intervals of f, over all outputs and queries, ± one standard error. *Spread*: median distance
of the truth from the centre in standard deviations, over that of a normal distribution: 1 if calibrated, above 1 if
the method is overconfident. *Ranked by*: at least 99 draws, or the normal distribution of mean and epistemic
variance. *Ranks*: a method is too narrow or too wide if its coverage at 90% differs by more than three standard
errors, and not uniform if a test has p < .01. A reference posterior that is not uniform is an error; the ranks of
approximations are results."""
_COLUMNS, _BINS = 4, 10
_COLOUR, _BAND = "#0b5c8a", "#dde3ea"


def write_sbc(result: SbcResult) -> Path:
    """Write sbc.md, sbc.json and a figure for each case into the directory of the result, each as a whole.

    Args:
        result: of `run_sbc`.

    Returns:
        The path of sbc.md.
    """
    lines = [to_markdown(result.summaries)]
    for case in dict.fromkeys(summary.case for summary in result.summaries):
        figure = sbc_figure([s for s in result.summaries if s.case == case and s.n])
        name = "".join(c if c.isalnum() else "_" for c in case)
        for form in ("png", "svg"):
            write_bytes(result.out / f"sbc_{name}.{form}", to_bytes(figure, form))
        lines.append(f"\n![ranks of the methods on {case}](sbc_{name}.svg)\n")
    content = [_numbers(summary) for summary in result.summaries]
    write_text(result.out / "sbc.json", json.dumps({"summaries": content}, indent=1) + "\n")
    write_text(result.out / "sbc.md", "".join(lines))
    return result.out / "sbc.md"


def to_markdown(summaries: Sequence[SbcSummary], *, title: str = "Simulation-based calibration") -> str:
    """Return the table as a Markdown page, with the reasons of replications that have no ranks."""
    lines = [f"# {title}", "", _LEGEND, "", *markdown_table(HEADER, table_rows(summaries))]
    for summary in summaries:
        for error in dict.fromkeys(summary.errors):
            n = summary.errors.count(error)
            lines += ["", f"- {summary.case}, {summary.method}: {n} without ranks: {' '.join(error.split())}"]
    return "\n".join(lines) + "\n"


def table_rows(summaries: Sequence[SbcSummary]) -> list[tuple[str, ...]]:
    """Return the entries of the table, one row per case and method."""
    return [_row(summary) for summary in summaries]


def sbc_figure(summaries: Sequence[SbcSummary]) -> Figure:
    """Return two panels per method: the histogram of ranks, and the ECDF minus the uniform one with a 95 % band."""
    columns = max(1, min(_COLUMNS, len(summaries)))
    lines = max(1, math.ceil(len(summaries) / columns))
    with rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns, 3.6 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2 * lines, columns, squeeze=False)
        for axes in panels.flatten():
            axes.set_axis_off()
        for i, summary in enumerate(summaries):
            line, column = divmod(i, columns)
            _draw_histogram(panels[2 * line, column], summary)
            _draw_ecdf(panels[2 * line + 1, column], summary)
    return figure


def _draw_histogram(axes: Axes, summary: SbcSummary) -> None:
    axes.set_axis_on()
    low, high = (stats.binom.ppf(q, summary.n, 1 / _BINS) for q in (0.025, 0.975))
    axes.axhspan(low, high, color=_BAND)
    axes.hist(summary.f, bins=[k / _BINS for k in range(_BINS + 1)], color=_COLOUR, rwidth=0.9)
    axes.set_title(f"{summary.method}\nKS p {_p(summary.ks[1], sign='= ')}", fontsize=7)
    axes.set_xlabel("rank of f(x*)")


def _draw_ecdf(axes: Axes, summary: SbcSummary) -> None:
    axes.set_axis_on()
    z, lower, upper = simultaneous_band(summary.n)
    axes.fill_between(z, lower, upper, color=_BAND, step="post", linewidth=0)
    for ranks, style, label in ((summary.f, "-", "f"), (summary.log_likelihood, ":", "log-likelihood")):
        if len(ranks):
            ecdf = np.searchsorted(np.sort(ranks), z, side="right") / len(ranks)
            axes.plot(z, ecdf - z, style, color=_COLOUR, linewidth=1, label=label)
    axes.axhline(0, color="#3b4350", linewidth=0.5)
    axes.set_xlabel("z")
    axes.set_ylabel("ECDF(z) − z")
    axes.legend(frameon=False, fontsize=6)


def _row(summary: SbcSummary) -> tuple[str, ...]:
    counts = f"{summary.n}" + (f", {len(summary.errors)} errors" if summary.errors else "")
    if not summary.n:
        return (summary.case, summary.method, "–", counts, *["–"] * (4 + len(LEVELS)), summary.verdict)
    coverage = (f"{share:.3f} ± {error:.3f}" for share, error in map(summary.coverage, LEVELS))
    return (
        summary.case,
        summary.method,
        summary.ranked_by,
        counts,
        _p(summary.ks[1]),
        f"{summary.ks[0]:.3f}",
        _p(summary.ks_log_likelihood[1]),
        *coverage,
        f"{summary.spread:.2f}" if summary.spread < 10 else "> 10",
        summary.verdict,
    )


def _p(value: float, *, sign: str = "") -> str:
    if math.isnan(value):
        return "–"
    return "< .0001" if value < 1e-4 else sign + f"{value:.4f}".removeprefix("0")


def _numbers(summary: SbcSummary) -> dict[str, object]:
    """Return every number of a summary for JSON."""
    numbers = {**asdict(summary), "n": summary.n, "verdict": summary.verdict}
    numbers |= {"f": summary.f.tolist(), "every_f": summary.every_f.tolist()}
    numbers["log_likelihood"] = summary.log_likelihood.tolist()
    if summary.n:
        distance, p = summary.ks
        numbers |= {"ks_distance": distance, "ks_p": p}
        numbers["coverage"] = {str(level): summary.coverage(level) for level in LEVELS}
    return numbers
