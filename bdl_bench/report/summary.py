"""The comparison over all tasks: average ranks, the first metric of every task, and total time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bdl_bench.metrics import Metric
from bdl_bench.report.figures.critical_difference import critical_difference_figure
from bdl_bench.report.figures.gallery import Gallery, Picture
from bdl_bench.report.findings import comparison_with_best
from bdl_bench.report.formatting import join_names, number
from bdl_bench.report.palette import Palette
from bdl_bench.report.scores import ScoreEntry
from bdl_bench.report.sections.agreement import AgreementSection
from bdl_bench.report.sections.cost import Costs
from bdl_bench.report.sections.fidelity import FidelitySection
from bdl_bench.report.sections.scores import Scores
from bdl_bench.report.seed_design import SeedDesign
from bdl_bench.stats import Ranking, rank_methods

__all__ = ["Column", "Section", "Summary", "SummaryRow", "TaskView", "summary"]


class Section(Protocol):
    """A part of a task: its data, and the name of its template."""

    @property
    def template(self) -> str: ...


@dataclass(frozen=True)
class TaskView:
    """One task: its main results in sentences, and its sections in the order of the page."""

    name: str
    anchor: str
    summary: str
    kind: str
    seeds: list[int]
    findings: list[str]
    scores: Scores
    costs: Costs
    agreement: AgreementSection
    design: SeedDesign
    fidelity: FidelitySection | None
    sections: list[Section]


@dataclass(frozen=True)
class Column:
    """A task and its first metric, by which methods are ranked."""

    task: str
    anchor: str
    metric: Metric
    tuned: bool


@dataclass(frozen=True)
class SummaryRow:
    """One method: average rank (None if it misses a task or seed), one entry per task, seconds over all its tasks."""

    method: str
    rank: float | None
    entries: list[ScoreEntry | None]
    seconds: float | None
    exclusive: bool


@dataclass(frozen=True)
class Summary:
    """Methods by rank, those without one last. There is no ranking for fewer than two tasks or three methods."""

    columns: list[Column]
    rows: list[SummaryRow]
    ranking: Ranking | None
    picture: Picture | None
    sentences: list[str]

    @property
    def unranked(self) -> list[str]:
        """Methods with missing tasks or seeds."""
        return [row.method for row in self.rows if row.rank is None] if self.ranking else []


def summary(tasks: Sequence[TaskView], palette: Palette, gallery: Gallery) -> Summary:
    """Return the summary by the first metric of each task, tuned if every method of the task was tuned."""
    columns = [Column(t.name, t.anchor, t.scores.first, t.scores.compared.tuned) for t in tasks]
    methods = list(dict.fromkeys(m for t in tasks for m in t.scores.untuned.entries))
    ranking = _ranking(tasks, methods)
    ranks = {} if ranking is None else ranking.average
    rows = sorted((_row(tasks, m, ranks.get(m)) for m in methods), key=lambda row: row.rank or float("inf"))
    drawings = [] if ranking is None else [critical_difference_figure(ranking, palette)]
    pictures = gallery.render("all tasks", drawings)
    sentences = [*_over_tasks(ranking), *(_task_sentence(t) for t in tasks)]
    return Summary(columns, rows, ranking, pictures[0] if pictures else None, sentences)


def _ranking(tasks: Sequence[TaskView], methods: Sequence[str]) -> Ranking | None:
    """Rank the methods that finished every seed of every task."""
    everywhere = [m for m in methods if all(_entry(t, m) is not None and m not in t.scores.incomplete for t in tasks)]
    if len(tasks) < 2 or len(everywhere) < 3:
        return None
    scores: dict[str, dict[str, float]] = {}
    for task in tasks:
        sign = -1 if task.scores.first.better == "higher" else 1
        entries = {m: _entry(task, m) for m in everywhere}
        scores[task.name] = {m: sign * entry.interval.mean for m, entry in entries.items() if entry is not None}
    return rank_methods(scores, "lower")


def _row(tasks: Sequence[TaskView], method: str, rank: float | None) -> SummaryRow:
    costs = [row for t in tasks for row in t.costs.rows if row.method == method]
    seconds = sum(row.total_seconds for row in costs) if costs else None
    entries = [_entry(t, method) for t in tasks]
    return SummaryRow(method, rank, entries, seconds, all(row.exclusive for row in costs))


def _entry(task: TaskView, method: str) -> ScoreEntry | None:
    return task.scores.compared.entries.get(method, {}).get(task.scores.first.key)


def _over_tasks(ranking: Ranking | None) -> list[str]:
    if ranking is None:
        return []
    rank = min(ranking.average.values())
    best = [m for m, r in ranking.average.items() if r == rank]
    group = next((group for group in ranking.groups if group[0] == best[0]), (best[0],))
    head = f"Best average rank over {ranking.n_tasks} tasks: {rank:.2f} ({join_names(best)})"
    tail = f"the critical difference is {ranking.critical_difference:.2f} (Nemenyi, 5 %)"
    if len(group) == len(ranking.average):
        return [f"{head}; {tail}. There is no significant difference between average ranks."]
    if len(group) == len(best):
        return [f"{head}; {tail}. All other ranks are significantly worse."]
    return [f"{head}; {tail}. Not significantly worse: {join_names(group[len(best) :])}."]


def _task_sentence(task: TaskView) -> str:
    """Return the best method of a task and how the others compare with it."""
    table, metric = task.scores.compared, task.scores.first
    if metric.key not in table.best:
        return f"{task.name}: {metric.label} has no best value."
    best = table.best[metric.key]
    names = join_names([best, *table.tied_with_best(metric.key)])
    head = f"{task.name}, {metric.label} {table.variant}: best mean {names}"
    value = number(table.entries[best][metric.key].interval.mean)
    return f"{head} ({value}){comparison_with_best(table, task.design) if len(table.entries) > 1 else ''}."
