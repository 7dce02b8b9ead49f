"""The comparison over all tasks: average ranks, the first metric of every task, the time in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bdl_bench.metrics import Metric
from bdl_bench.report.figures.critical_difference import critical_difference_figure
from bdl_bench.report.figures.gallery import Gallery, Picture
from bdl_bench.report.formatting import listed, number
from bdl_bench.report.palette import Palette
from bdl_bench.report.scores import ScoreCell
from bdl_bench.report.sections.cost import Costs
from bdl_bench.report.sections.scores import Scores
from bdl_bench.stats import Ranking, rank_methods

__all__ = ["Column", "Summary", "SummaryRow", "summary"]


class OfTask(Protocol):
    """What a summary needs of a task."""

    @property
    def name(self) -> str: ...
    @property
    def anchor(self) -> str: ...
    @property
    def scores(self) -> Scores: ...
    @property
    def costs(self) -> Costs: ...


@dataclass(frozen=True)
class Column:
    """A task with the metric that stands for it."""

    task: str
    anchor: str
    metric: Metric
    tuned: bool


@dataclass(frozen=True)
class SummaryRow:
    """One method: average rank (None where it misses a task or a seed), a cell a task, seconds over all its tasks."""

    method: str
    rank: float | None
    cells: list[ScoreCell | None]
    seconds: float | None
    exclusive: bool


@dataclass(frozen=True)
class Summary:
    """Rows by rank, those without one last; no ranking for fewer than two tasks or three methods."""

    columns: list[Column]
    rows: list[SummaryRow]
    ranking: Ranking | None
    picture: Picture | None
    sentences: list[str]

    @property
    def unranked(self) -> list[str]:
        """Methods that miss a task or a seed."""
        return [row.method for row in self.rows if row.rank is None] if self.ranking else []


def summary(tasks: Sequence[OfTask], palette: Palette, gallery: Gallery) -> Summary:
    """By the first metric of each task, tuned where every method of the task was."""
    columns = [Column(t.name, t.anchor, t.scores.first, t.scores.fair.tuned) for t in tasks]
    methods = list(dict.fromkeys(m for t in tasks for m in t.scores.fitted.cells))
    ranking = _ranking(tasks, methods)
    ranks = {} if ranking is None else ranking.average
    rows = sorted((_row(tasks, m, ranks.get(m)) for m in methods), key=lambda row: row.rank or float("inf"))
    drawings = [] if ranking is None else [critical_difference_figure(ranking, palette)]
    pictures = gallery.show("all tasks", drawings)
    sentences = [*_over_tasks(ranking), *(_of_task(t) for t in tasks)]
    return Summary(columns, rows, ranking, pictures[0] if pictures else None, sentences)


def _ranking(tasks: Sequence[OfTask], methods: Sequence[str]) -> Ranking | None:
    """Of the methods that every task has with every seed."""
    everywhere = [m for m in methods if all(_cell(t, m) is not None and m not in t.scores.incomplete for t in tasks)]
    if len(tasks) < 2 or len(everywhere) < 3:
        return None
    scores: dict[str, dict[str, float]] = {}
    for task in tasks:
        sign = -1 if task.scores.first.better == "higher" else 1
        cells = {m: _cell(task, m) for m in everywhere}
        scores[task.name] = {m: sign * cell.interval.mean for m, cell in cells.items() if cell is not None}
    return rank_methods(scores, "lower")


def _row(tasks: Sequence[OfTask], method: str, rank: float | None) -> SummaryRow:
    costs = [row for t in tasks for row in t.costs.rows if row.method == method]
    seconds = sum(row.total_seconds for row in costs) if costs else None
    cells = [_cell(t, method) for t in tasks]
    return SummaryRow(method, rank, cells, seconds, all(row.exclusive for row in costs))


def _cell(task: OfTask, method: str) -> ScoreCell | None:
    return task.scores.fair.cells.get(method, {}).get(task.scores.first.key)


def _over_tasks(ranking: Ranking | None) -> list[str]:
    if ranking is None:
        return []
    rank = min(ranking.average.values())
    best = [m for m, r in ranking.average.items() if r == rank]
    group = next((group for group in ranking.groups if group[0] == best[0]), (best[0],))
    head = f"Over {ranking.n_tasks} tasks the best average rank is {rank:.2f}, of {listed(best)}"
    tail = f"the critical difference is {ranking.critical_difference:.2f} (Nemenyi, 5 %)"
    if len(group) == len(ranking.average):
        return [f"{head}; {tail}, so that by ranks no two methods are distinguishable."]
    if len(group) == len(best):
        return [f"{head}, distinguishable from every other; {tail}."]
    return [f"{head}; {tail}. Not distinguishable from it: {listed(group[len(best) :])}."]


def _of_task(task: OfTask) -> str:
    """The best group of a task."""
    table, metric = task.scores.fair, task.scores.first
    state = "tuned" if table.tuned else "as fitted"
    if metric.key not in table.best:
        return f"{task.name}: {metric.label} has no best value."
    best = table.best[metric.key]
    head = f"{task.name}, {metric.label} {state}: best {best} ({number(table.cells[best][metric.key].interval.mean)})"
    marked = [m for m, row in table.cells.items() if metric.key in row and row[metric.key].in_best_group]
    if not marked:
        return f"{head}, but no two methods are distinguishable by it." if len(table.cells) > 1 else f"{head}."
    others = [m for m in marked if m != best]
    return f"{head}; not distinguishable from it: {listed(others)}." if others else f"{head}, ahead of all others."
