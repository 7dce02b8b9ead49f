"""The comparison over all tasks: the recommendation, effects on the first metric, its values, total time, and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite
from typing import Protocol

from bdl_bench.metrics import Metric
from bdl_bench.report.figures.canvas import Drawing
from bdl_bench.report.figures.critical_difference import critical_difference_figure
from bdl_bench.report.figures.forest import forest
from bdl_bench.report.figures.gallery import Gallery, Picture
from bdl_bench.report.findings import comparison_with_best
from bdl_bench.report.formatting import join_names, number
from bdl_bench.report.overall import Overall, overall
from bdl_bench.report.palette import Palette
from bdl_bench.report.recommendation import Evidence, Recommendation, recommendation
from bdl_bench.report.scores import ScoreEntry
from bdl_bench.report.sections.agreement import AgreementSection
from bdl_bench.report.sections.cost import Costs
from bdl_bench.report.sections.fidelity import FidelitySection
from bdl_bench.report.sections.scores import Scores
from bdl_bench.report.seed_design import SeedDesign
from bdl_bench.report.single_tasks import on_single_tasks
from bdl_bench.stats import FEWEST_TASKS, Interval, Ranking, Verdict, rank_methods

__all__ = ["Column", "Section", "Summary", "SummaryRow", "TaskView", "summary"]

_MOST_COLUMNS = 6
"""Tasks in one table."""


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
    with_variance: list[str]
    """Methods with an epistemic variance that is not zero."""
    trained_further: list[str]
    """What was trained further although it came with trained weights, in a sentence each."""


@dataclass(frozen=True)
class Column:
    """A task and its first metric, by which methods are ranked."""

    task: str
    anchor: str
    metric: Metric
    tuned: bool


@dataclass(frozen=True)
class SummaryRow:
    """One method.

    Args:
        method: its name.
        effect: its difference from the baseline, mean over the tasks; None without one.
        verdict: on this difference; None for the baseline and without one.
        posterior_rank: mean rank by the distance from the posterior; None if it was not measured.
        entries: one per task.
        seconds: over all its tasks.
        exclusive: whether no other job ran at the time of its runs.
        rank: average rank over the tasks; None if it misses a task or seed, or has a value that is not finite.
    """

    method: str
    effect: Interval | None
    verdict: Verdict | None
    posterior_rank: float | None
    entries: list[ScoreEntry | None]
    seconds: float | None
    exclusive: bool
    rank: float | None


@dataclass(frozen=True)
class Summary:
    """The recommendation and the methods by effect, those without one last.

    There is no ranking for fewer than two tasks or three methods, or if neither direction of a metric is better. Its
    figure needs `FEWEST_TASKS` tasks.
    """

    columns: list[Column]
    rows: list[SummaryRow]
    overall: Overall | None
    recommendation: Recommendation | None
    effects: Picture | None
    ranking: Ranking | None
    picture: Picture | None
    sentences: list[str]
    warnings: list[str]

    def column_blocks(self, most: int = _MOST_COLUMNS) -> list[list[int]]:
        """Indices of the columns by table, `most` in one: of many tasks one table would be wider than the page."""
        n = len(self.columns)
        n_tables = max(1, ceil(n / most))
        return [list(range(n * k // n_tables, n * (k + 1) // n_tables)) for k in range(n_tables)]

    @property
    def unranked(self) -> list[str]:
        """Methods with missing tasks or seeds, or values that are not finite."""
        return [row.method for row in self.rows if row.rank is None] if self.ranking else []

    @property
    def not_everywhere(self) -> list[str]:
        """Methods that miss a task or seed or have a value that is not finite, and so have no effect over the tasks."""
        return [] if self.overall is None else [r.method for r in self.rows if r.method not in self.overall.means]

    @property
    def fewest_tasks(self) -> int:
        """The number of tasks from which on ranks are tested."""
        return FEWEST_TASKS


def summary(tasks: Sequence[TaskView], palette: Palette, gallery: Gallery) -> Summary:
    """Return the summary by the first metric of each task, tuned if every method of the task was tuned."""
    columns = [Column(t.name, t.anchor, t.scores.first, t.scores.compared.tuned) for t in tasks]
    methods = list(dict.fromkeys(m for t in tasks for m in t.scores.untuned.entries))
    found, posterior = overall(tasks), _posterior_ranks(tasks)
    ranking = _ranking(tasks, methods)
    ranks = {} if ranking is None else ranking.average
    rows = [_row(tasks, m, found, posterior.get(m), ranks.get(m)) for m in methods]
    order = {m: i for i, m in enumerate(found.means if found else ranks)}
    rows.sort(key=lambda row: order.get(row.method, len(order)))
    evidence = Evidence(
        {row.method: row.seconds for row in rows if row.seconds is not None},
        {m for t in tasks for m in t.with_variance},
        posterior,
        [t.name for t in tasks if t.fidelity is not None and t.fidelity.sets],
        all(row.exclusive for row in rows),
    )
    tested = ranking is not None and ranking.n_tasks >= FEWEST_TASKS
    return Summary(
        columns,
        rows,
        found,
        None if found is None else _with_single_tasks(recommendation(found, evidence), tasks),
        _first(gallery.render("all tasks", [d for d in [_effects(found, palette)] if d is not None])),
        ranking,
        _first(
            gallery.render("all tasks", [critical_difference_figure(ranking, palette)] if ranking and tested else [])
        ),
        [*(_over_tasks(ranking) if tested else []), *(_task_sentence(t) for t in tasks)],
        [f"{t.name}: {sentence}" for t in tasks for sentence in t.trained_further],
    )


def _with_single_tasks(found: Recommendation, tasks: Sequence[TaskView]) -> Recommendation:
    answer = on_single_tasks(tasks)
    return found if answer is None else replace(found, answers=[*found.answers, answer])


def _first(pictures: Sequence[Picture]) -> Picture | None:
    return pictures[0] if pictures else None


def _effects(found: Overall | None, palette: Palette) -> Drawing | None:
    if found is None or found.baseline is None:
        return None
    over = f", {'mean ' if len(found.tasks) > 1 else ''}{found.scope}" if found.scope else ""
    return forest(
        "effects",
        f"{found.metric.label} of each method − that of {found.baseline}{over}",
        found.tests.baseline_differences,
        palette,
        verdicts=found.tests.with_baseline,
        label=f"difference in {found.metric.label}{',' + found.unit if found.unit else ''}",
        lower_is_better=found.metric.better == "lower",
        relevant=found.smallest_relevant,
    )


def _posterior_ranks(tasks: Sequence[TaskView]) -> dict[str, float]:
    """Return the mean rank by the distance from the posterior at the test rows, of methods ranked on all such tasks."""
    tables = [t.fidelity.sets[0].untuned for t in tasks if t.fidelity is not None and t.fidelity.sets]
    ranks = [{row.method: row.rank for row in table.rows if row.rank is not None} for table in tables]
    if not ranks:
        return {}
    return {m: sum(found[m] for found in ranks) / len(ranks) for m in ranks[0] if all(m in found for found in ranks)}


def _ranking(tasks: Sequence[TaskView], methods: Sequence[str]) -> Ranking | None:
    """Rank the methods that finished every seed of every task; None if a first metric has no better direction."""
    everywhere = [m for m in methods if all(_is_ranked(t, m) for t in tasks)]
    if len(tasks) < 2 or len(everywhere) < 3 or any(t.scores.first.better is None for t in tasks):
        return None
    scores: dict[str, dict[str, float]] = {}
    for task in tasks:
        sign = -1 if task.scores.first.better == "higher" else 1
        entries = {m: _entry(task, m) for m in everywhere}
        scores[task.name] = {m: sign * entry.interval.mean for m, entry in entries.items() if entry is not None}
    return rank_methods(scores, "lower")


def _is_ranked(task: TaskView, method: str) -> bool:
    entry = _entry(task, method)
    return entry is not None and method not in task.scores.incomplete and isfinite(entry.interval.mean)


def _row(
    tasks: Sequence[TaskView], method: str, found: Overall | None, posterior: float | None, rank: float | None
) -> SummaryRow:
    costs = [row for t in tasks for row in t.costs.rows if row.method == method]
    return SummaryRow(
        method,
        None if found is None else found.tests.baseline_differences.get(method),
        None if found is None else found.tests.with_baseline.get(method),
        posterior,
        [_entry(t, method) for t in tasks],
        sum(row.total_seconds for row in costs) if costs else None,
        all(row.exclusive for row in costs),
        rank,
    )


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
