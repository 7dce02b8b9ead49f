"""The tables of a report for LaTeX, with the package booktabs: one file per task, and one of the summary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count

from bdl_bench.metrics import Metric
from bdl_bench.report.formatting import MINUS, mean_and_half_width, number
from bdl_bench.report.scores import ScoreEntry, ScoreTable
from bdl_bench.report.summary import Summary, TaskView
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
    found = summary.overall
    effect = found is not None and found.baseline is not None
    head = ["Method"]
    if found is not None and effect:
        over = f", mean of {len(found.tasks)} tasks" if len(found.tasks) > 1 else ""
        head.append(_escaped(f"{found.metric.label} {MINUS} {found.baseline}{over}"))
    head += [_escaped(f"{c.task}: {c.metric.label}") + _ARROWS[c.metric.better] for c in summary.columns]
    rows = []
    for row in summary.rows:
        entries = [_first_entry(row.method)]
        if effect:
            mark = _MARKS.get(row.verdict or "", "")
            entries.append("0" if found and row.method == found.baseline else _interval(row.effect) + mark)
        entries += [_entry(entry) for entry in row.entries]
        rows.append([*entries, "--" if row.seconds is None else _escaped(in_seconds(row.seconds))])
    caption = "All methods on all tasks: means over seeds $\\pm$ half of the 95\\,\\% interval. "
    return _table([*head, "time"], rows, caption + _reading(), "summary")


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
    return _table(head, rows, caption + _reading(), label)


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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, label: str) -> str:
    body = "\n".join(f"    {' & '.join(row)} \\\\" for row in rows)
    return (
        "% needs \\usepackage{booktabs,graphicx}\n"
        "\\begin{table}\n  \\centering\n"
        f"  \\caption{{{caption}}}\n  \\label{{tab:{label}}}\n"
        f"  \\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n"
        f"  \\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n    \\toprule\n"
        f"    {' & '.join(head)} \\\\\n    \\midrule\n{body}\n    \\bottomrule\n"
        "  \\end{tabular}}\n\\end{table}\n"
    )


def _entry(entry: ScoreEntry | None) -> str:
    if entry is None:
        return "--"
    text = _interval(entry.interval)
    bold = f"\\textbf{{{text}}}" if entry.not_worse_than_best else text
    return bold + _MARKS.get(entry.against_baseline or "", "")


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
