"""A report as Markdown: the tables and sentences, without figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bdl_bench.markdown import markdown_table
from bdl_bench.report.formatting import count, mean_and_half_width, number
from bdl_bench.report.reference_agreement import CostRow
from bdl_bench.report.scores import ScoreEntry, ScoreTable
from bdl_bench.report.sections.custom import CustomSection
from bdl_bench.report.sections.decisions import Decisions
from bdl_bench.report.sections.interventions import Effects, effect_words
from bdl_bench.report.summary import TaskView
from bdl_bench.report.view import Report
from bdl_bench.stats import Interval
from estimators.runtime.units import in_bytes, in_seconds

__all__ = ["to_markdown"]


def to_markdown(report: Report) -> str:
    """Return the text."""
    lines = ["# Comparison of predictive uncertainty", "", *_summary(report), *_what_was_run(report)]
    for task in report.tasks:
        lines += _task(task)
    lines += _not_finished(report)
    lines += _unreadable(report)
    lines += ["", "## How to reproduce", "", *(f"    {line}" for line in report.command.splitlines()), ""]
    for environment in report.environments:
        lines += [", ".join(f"{_escaped(name)} {_escaped(value)}" for name, value in environment.items()), ""]
    return "\n".join(lines)


def _summary(report: Report) -> list[str]:
    found = report.summary
    if found is None:
        return []
    ranked = ["average rank"] if found.ranking else []
    tasks = [
        f"{_escaped(c.task)}: {_escaped(c.metric.label)} {'tuned' if c.tuned else 'untuned'}" for c in found.columns
    ]
    rows = (
        (
            _escaped(row.method),
            *(["–" if row.rank is None else number(row.rank)] if found.ranking else []),
            *(_score(entry) for entry in row.entries),
            "–" if row.seconds is None else in_seconds(row.seconds),
        )
        for row in found.rows
    )
    sentences = [f"- {_escaped(sentence)}" for sentence in found.sentences]
    return [*sentences, "", *_numbers(("method", *ranked, *tasks, "time"), rows), ""]


def _what_was_run(report: Report) -> list[str]:
    seeds = ", ".join(map(str, report.seeds))
    tuned = f"Tuned: the options with the best score on the validation rows, with {report.tuning_budget}."
    settings = tuned if report.tuned else "The task fixes the prior precision δ; no method was tuned."
    return [
        f"Made {report.created}. Seeds: {seeds}. The network was trained once per task and seed. Every method "
        f"starts from this network, except methods that train their own. {settings}",
        "",
        *markdown_table(("method", "what it is"), ((_escaped(m), _escaped(s)) for m, s in report.methods.items())),
    ]


def _task(task: TaskView) -> list[str]:
    lines = ["", f"## {_escaped(task.name)}", "", _escaped(task.summary), ""]
    lines += [f"- {_escaped(sentence)}" for sentence in task.findings]
    for table in task.scores.tables:
        lines += ["", "Tuned on validation data:" if table.tuned else "Untuned:", "", *_scores(table)]
    bold = "Bold: not significantly worse than the best."
    lines += ["", f"Mean ± half of the 95 % interval. {bold} {task.design.description}"]
    lines += _fidelity(task)
    if task.agreement.rows:
        header = ["method", "Spearman", "mean ratio", "relative RMSE"]
        agreements = (
            (_escaped(a.method), _maybe(a.spearman), _joined(a.mean_ratio), _joined(a.relative_rmse))
            for a in task.agreement.rows
        )
        lines += ["", "Agreement with linearized Laplace, untuned:", "", *_numbers(header, agreements)]
    for section in task.sections:
        if isinstance(section, CustomSection):
            lines += _custom(section)
        elif isinstance(section, Decisions):
            lines += _decisions(section)
        elif isinstance(section, Effects):
            lines += _effects(section)
    header = ["method", "fit", "tune", "predict", "epoch equivalents (forward + backward)", "peak memory"]
    return [*lines, "", "Cost, medians over seeds:", "", *_numbers(header, map(_cost, task.costs.rows))]


def _fidelity(task: TaskView) -> list[str]:
    section = task.fidelity
    if section is None:
        return []
    lines = ["", "Fidelity: distance from the posterior, untuned.", ""]
    lines += [f"- {_escaped(sentence)}" for sentence in section.sentences]
    lines += [f"- Reference not reached, seed {seed}: {_escaped(reason)}" for seed, reason in section.missing.items()]
    for found in section.sets:
        header = [_escaped(found.name), "rank", *(_escaped(column.label) for column in section.columns)]
        floor = ["noise floor", "", *(_number(found.floor[column.field]) for column in section.columns)]
        rows = [
            [
                _escaped(row.method),
                "–" if row.rank is None else str(row.rank),
                *(_maybe(row.intervals[column.field]) for column in section.columns),
            ]
            for row in found.untuned.rows
        ]
        lines += ["", *_numbers(header, [floor, *rows])]
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else number(value)


def _scores(table: ScoreTable) -> list[str]:
    header = ["method", *(_escaped(f"{metric.label} {metric.key}") for metric in table.metrics)]
    keys = [metric.key for metric in table.metrics]
    rows = ((_escaped(m), *(_score(row.get(key)) for key in keys)) for m, row in table.entries.items())
    return _numbers(header, rows)


def _custom(section: CustomSection) -> list[str]:
    text = [_escaped(paragraph) for paragraph in (*section.text, *([section.error] if section.error else []))]
    table = _numbers([_escaped(h) for h in section.header], [[_escaped(e) for e in row] for row in section.rows])
    return ["", f"### {_escaped(section.title)}", "", *text, *(["", *table] if section.header else [])]


def _decisions(section: Decisions) -> list[str]:
    header = ["method", *(f"gain over {over} {key}" for key, over in section.header.items())]
    rows = (
        [_escaped(method), *(f"{_joined(gain.interval)} ({gain.verdict})" for gain in gains.values())]
        for method, gains in section.gains.items()
    )
    sentences = [f"- {_escaped(sentence)}" for sentence in section.sentences]
    return ["", f"### {section.title}", "", *sentences, "", section.note, "", *_numbers(header, rows)]


def _effects(section: Effects) -> list[str]:
    header = ["method", *(f"{words} (expected: {expected})" for words, expected in section.header.values())]
    rows = (
        [_escaped(method), *(f"{effect_words(effect)}, {effect.found}" for effect in effects.values())]
        for method, effects in section.rows.items()
    )
    sentences = [f"- {_escaped(sentence)}" for sentence in section.sentences]
    title = "### Decisions: interventions on the training set"
    return ["", title, "", *sentences, "", section.note, "", *_numbers(header, rows)]


def _cost(row: CostRow) -> Sequence[str]:
    seconds = (row.fit_seconds, row.tuning_seconds, row.predict_seconds)
    times = ("–" if value is None else in_seconds(value) for value in seconds)
    return (_escaped(row.method), *times, count(row.passes), in_bytes(row.peak_bytes))


def _not_finished(report: Report) -> list[str]:
    records = [*report.skipped, *report.failed]
    if not records:
        return []
    rows = ((_escaped(r.task), _escaped(r.method), str(r.seed), r.status, _escaped(r.reason or "")) for r in records)
    return ["", "## Skipped and failed", "", *_numbers(("task", "method", "seed", "status", "reason"), rows)]


def _unreadable(report: Report) -> list[str]:
    if not report.unreadable:
        return []
    rows = ((_escaped(name), _escaped(reason)) for name, reason in report.unreadable.items())
    return ["", "## Files that cannot be read as records", "", *_numbers(("file", "reason"), rows)]


def _score(entry: ScoreEntry | None) -> str:
    if entry is None:
        return "–"
    text = _joined(entry.interval)
    return f"**{text}**" if entry.not_worse_than_best else text


def _maybe(interval: Interval | None) -> str:
    return "constant" if interval is None else _joined(interval)


def _joined(interval: Interval) -> str:
    return " ".join(part for part in mean_and_half_width(interval) if part)


def _numbers(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return markdown_table(header, rows, align_right=True)


def _escaped(text: str) -> str:
    """Escape markup and HTML, and join lines."""
    safe = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|!#])", r"\\\1", safe)
