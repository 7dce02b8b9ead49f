"""A report as Markdown: the tables and sentences, without pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bdl_bench.report.scores import ScoreCell
from bdl_bench.report.text import duration, mebibytes, with_half_width
from bdl_bench.report.view import Report, TaskView
from bdl_bench.stats import Interval

__all__ = ["to_markdown"]


def to_markdown(report: Report) -> str:
    """The text."""
    lines = ["# Comparison of predictive uncertainty", "", *_what_was_run(report)]
    for task in report.tasks:
        lines += _task(task)
    lines += _not_finished(report)
    lines += ["", "## How to reproduce", "", f"    {_line(report.command)}", ""]
    for environment in report.environments:
        lines += [", ".join(f"{_escaped(name)} {_escaped(value)}" for name, value in environment.items()), ""]
    return "\n".join(lines)


def _what_was_run(report: Report) -> list[str]:
    seeds = ", ".join(map(str, report.seeds))
    return [
        f"Made {report.created}. Seeds: {seeds}. The network was trained once for each task and seed, and every method "
        "started from it. The prior precision δ is fixed by the task; nothing was tuned.",
        "",
        *_table(("method", "what it is"), ((_escaped(m), _escaped(s)) for m, s in report.methods.items())),
    ]


def _task(task: TaskView) -> list[str]:
    lines = ["", f"## {_escaped(task.name)}", "", _escaped(task.summary), ""]
    lines += [f"- {_escaped(sentence)}" for sentence in task.findings]
    header = ["method", *(f"{metric.label} {metric.key}" for metric in task.scores.metrics)]
    keys = [metric.key for metric in task.scores.metrics]
    rows = ((_escaped(m), *(_score(cells[key]) for key in keys)) for m, cells in task.scores.cells.items())
    lines += ["", *_table(header, rows), "", "Mean ± half of the 95 % interval over seeds; bold: the best group."]
    if task.agreements:
        header = ["method", "Spearman", "mean ratio", "relative RMSE"]
        agreements = (
            (_escaped(a.method), _maybe(a.spearman), _joined(a.mean_ratio), _joined(a.relative_rmse))
            for a in task.agreements
        )
        lines += ["", "Agreement with the exact variance:", "", *_table(header, agreements)]
    header = ["method", "fit", "predict", "peak memory"]
    costs = (
        (_escaped(c.method), duration(c.fit_seconds), duration(c.predict_seconds), mebibytes(c.peak_bytes))
        for c in task.costs
    )
    return [*lines, "", "Cost, medians over seeds:", "", *_table(header, costs)]


def _not_finished(report: Report) -> list[str]:
    records = [*report.skipped, *report.failed]
    if not records:
        return []
    rows = ((_escaped(r.task), _escaped(r.method), str(r.seed), r.status, _escaped(r.reason or "")) for r in records)
    return ["", "## Skipped and failed", "", *_table(("task", "method", "seed", "status", "reason"), rows)]


def _score(cell: ScoreCell) -> str:
    text = _joined(cell.interval)
    return f"**{text}**" if cell.in_best_group else text


def _maybe(interval: Interval | None) -> str:
    return "constant" if interval is None else _joined(interval)


def _joined(interval: Interval) -> str:
    return " ".join(part for part in with_half_width(interval) if part)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _escaped(text: str) -> str:
    """No markup, HTML, table or line break of its own."""
    safe = _line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|!#])", r"\\\1", safe)


def _line(text: str) -> str:
    return " ".join(text.split())
