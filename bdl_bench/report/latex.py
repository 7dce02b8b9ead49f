"""The tables of a report for LaTeX, with the package booktabs: one file per task, and one of the summary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count

from bdl_bench.metrics import Metric
from bdl_bench.report.formatting import MINUS, effect, mean_and_half_width, number
from bdl_bench.report.scores import ScoreEntry, ScoreTable
from bdl_bench.report.summary import Summary, SummaryRow, TaskView
from bdl_bench.report.view import Report
from bdl_bench.stats import Interval
from estimators.runtime.units import in_seconds

__all__ = ["to_latex"]

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", MINUS: "$-$", "–": "--", "±": r"$\pm$", "×": r"$\times$",
    "δ": r"$\delta$", "σ": r"$\sigma$", "λ": r"$\lambda$", "√": r"$\surd$", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
    "’": "'", "…": r"\ldots{}",
}  # fmt: skip
_ARROWS = {"lower": r" $\downarrow$", "higher": r" $\uparrow$", None: ""}
_MARKS = {"better": "$^{+}$", "worse": "$^{-}$"}
_TEST = ("cls/", "reg/", "cal/", "cov/", "cp/")
_MOST_COLUMNS = 6
"""Columns of a table, so that it fits a page; `--metrics` selects others."""
_MOST_ROWS, _ROWS_OF_RULES = 44, 3
"""Rows of the summary on one page, and the height of the head and rules of a part, in rows."""
_MOST_TASKS = 4
"""Tasks in one part of the summary, beside the mean over the tasks and the time."""


def to_latex(report: Report) -> dict[str, str]:
    r"""Return the tables by file name: `summary.tex`, one file per task, and `tables.tex`, a document of all of them.

    Args:
        report: of some tasks, methods and columns.

    Returns:
        The text of each file. A table needs \usepackage{booktabs} and \usepackage{graphicx}.
    """
    files: dict[str, str] = {}
    if report.summary is not None:
        files["summary.tex"] = _summary(report.summary)
    for task in report.tasks:
        plain = re.sub(r"[^A-Za-z0-9]+", "-", task.name).strip("-").lower()[:60] or "task"
        numbered = (f"{plain}.tex" if i == 1 else f"{plain}-{i}.tex" for i in count(1))
        name = next(name for name in numbered if name not in (*files, "tables.tex"))
        files[name] = _task(task, name.removesuffix(".tex"), selected=report.columns_are_selected)
    inputs = "\n".join(rf"\input{{{name}}}" for name in files)
    packages = "\n".join((r"\usepackage[utf8]{inputenc}", r"\usepackage{booktabs,graphicx}"))
    files["tables.tex"] = f"\\documentclass{{article}}\n{packages}\n\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    return files


def _summary(summary: Summary) -> str:
    blocks = summary.column_blocks(_MOST_TASKS)
    tabulars = [_summary_block(summary, block, first=block is blocks[0]) for block in blocks]
    n_parts = max(1, _MOST_ROWS // (len(summary.rows) + _ROWS_OF_RULES))
    common = _common_metric(summary)
    of = "all tasks" if common is None else f"all tasks, {_escaped(common.label)}{_ARROWS[common.better]}"
    caption = f"All methods on {of}: means over seeds $\\pm$ half of the 95\\,\\% interval. "
    first, *others = (tabulars[start : start + n_parts] for start in range(0, len(tabulars), n_parts))
    tables = [_table(first, caption + _reading(), "summary")]
    tables += [_table(part, "All methods, continued.", f"summary-{i}") for i, part in enumerate(others, start=2)]
    return "\n".join(tables)


def _common_metric(summary: Summary) -> Metric | None:
    """Return a metric of which all columns have the label and direction, which then stand in the caption."""
    metrics = [column.metric for column in summary.columns]
    return metrics[0] if len({(metric.label, metric.better) for metric in metrics}) == 1 else None


def _summary_block(summary: Summary, block: Sequence[int], *, first: bool) -> str:
    """Return the columns of some tasks, with the mean over all tasks and the time in the first block."""
    found = summary.overall
    with_effect = first and found is not None and found.baseline is not None
    head = ["Method"]
    if found is not None and with_effect:
        over = f", mean of {len(found.tasks)} tasks" if len(found.tasks) > 1 else ""
        head.append(_escaped(f"{found.metric.label} {MINUS} {found.baseline}{over}"))
    columns = [summary.columns[i] for i in block]
    if _common_metric(summary) is not None:
        head += [_escaped(c.task) for c in columns]
    else:
        head += [_escaped(f"{c.task}: {c.metric.label}") + _ARROWS[c.metric.better] for c in columns]
    rows = []
    for row in summary.rows:
        entries = [_first_entry(row.method)]
        if found is not None and with_effect:
            entries.append("0" if row.method == found.baseline else _effect(row, found.smallest_relevant))
        entries += [_entry(row.entries[i]) for i in block]
        if first:
            entries.append("--" if row.seconds is None else _escaped(in_seconds(row.seconds)))
        rows.append(entries)
    return _tabular([*head, "time"] if first else head, rows)


def _task(task: TaskView, label: str, *, selected: bool) -> str:
    table = task.scores.compared
    metrics = table.metrics if selected else _columns(table)
    head = ["Method", *(_escaped(metric.label) + _ARROWS[metric.better] for metric in metrics)]
    rows = [
        [_first_entry(method), *(_entry(entries.get(metric.key)) for metric in metrics)]
        for method, entries in table.entries.items()
    ]
    seeds = f"{task.design.n_distinct} seed{'' if task.design.n_distinct == 1 else 's'}"
    variant = "tuned on validation data" if table.tuned else "untuned"
    caption = f"{_escaped(task.name)}, {variant}: means over {seeds} $\\pm$ half of the 95\\,\\% interval. "
    return _table([_tabular(head, rows)], caption + _reading(), label)


def _columns(table: ScoreTable) -> Sequence[Metric]:
    shown = [metric for metric in table.metrics if metric.key.startswith(_TEST) or "/" not in metric.key]
    folded = table.folded(*(metric.key for metric in shown))
    own = [metric for metric in table.metrics if not metric.key.startswith((*_TEST, "sc/", "width/", "ood/"))]
    return [m for m in dict.fromkeys([*shown, *own]) if m.key not in folded][:_MOST_COLUMNS]


def _reading() -> str:
    return (
        "Bold: the best mean and every method that is not worse; "
        "$^{+}$ better, $^{-}$ worse than map (5\\,\\%, Holm; at least the smallest relevant difference)."
    )


def _table(tabulars: Sequence[str], caption: str, label: str) -> str:
    body = "\n\n  \\medskip\n".join(tabulars)
    return (
        "% needs \\usepackage{booktabs,graphicx}\n"
        "\\begin{table}\n  \\centering\\footnotesize\n"
        f"  \\caption{{{caption}}}\n  \\label{{tab:{label}}}\n{body}\n\\end{{table}}\n"
    )


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "\n".join(f"    {' & '.join(row)} \\\\" for row in rows)
    return (
        f"  \\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n"
        f"  \\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n    \\toprule\n"
        f"    {' & '.join(head)} \\\\\n    \\midrule\n{body}\n    \\bottomrule\n"
        "  \\end{tabular}}"
    )


def _entry(entry: ScoreEntry | None) -> str:
    if entry is None:
        return "--"
    text = _interval(entry.interval)
    bold = f"\\textbf{{{text}}}" if entry.not_worse_than_best else text
    return bold + _MARKS.get(entry.against_baseline or "", "")


def _effect(row: SummaryRow, smallest_relevant: float) -> str:
    if row.effect is None:
        return "--"
    text = " ".join(part for part in effect(row.effect, smallest_relevant) if part)
    return _escaped(text) + _MARKS.get(row.verdict or "", "")


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "--"
    return _escaped(" ".join(part for part in mean_and_half_width(interval) if part)) or number(interval.mean)


def _first_entry(name: str) -> str:
    r"""Return a name that is no option of the \\ or \midrule before it: in braces if it begins with [ or *."""
    text = _escaped(name)
    return f"{{{text}}}" if text.startswith(("[", "*")) else text


def _escaped(text: str) -> str:
    """Return text that LaTeX sets as it is; a character beyond Latin-1 that has no command is a question mark."""
    plain = "".join(_SPECIAL.get(sign, sign) for sign in " ".join(text.split()))
    return plain.encode("latin-1", "replace").decode("latin-1")
