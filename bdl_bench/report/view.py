"""The content of a report as plain data, built once from records and rendered as HTML, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bdl_bench.methods import METHODS
from bdl_bench.records.record import Record, RecordStore
from bdl_bench.report.figures.canvas import styled
from bdl_bench.report.figures.gallery import Gallery
from bdl_bench.report.findings import findings, overtuned, trained_further
from bdl_bench.report.formatting import join_names
from bdl_bench.report.palette import Palette
from bdl_bench.report.reproduce import command
from bdl_bench.report.results import TaskResults, group_by_task, load_records
from bdl_bench.report.sections.agreement import agreement
from bdl_bench.report.sections.bands import bands
from bdl_bench.report.sections.calibration import calibration
from bdl_bench.report.sections.configuration import configuration
from bdl_bench.report.sections.context import Context
from bdl_bench.report.sections.cost import costs
from bdl_bench.report.sections.custom import custom_sections
from bdl_bench.report.sections.decisions import decisions
from bdl_bench.report.sections.disagreement import disagreements
from bdl_bench.report.sections.fidelity import fidelity_section
from bdl_bench.report.sections.interventions import interventions
from bdl_bench.report.sections.ood import out_of_distribution
from bdl_bench.report.sections.scores import scores
from bdl_bench.report.sections.selective import selective
from bdl_bench.report.sections.shift import shift
from bdl_bench.report.sections.tuning import tuning
from bdl_bench.report.seed_design import seed_design
from bdl_bench.report.selection import EVERYTHING, Selection
from bdl_bench.report.summary import Section, Summary, TaskView, summary
from bdl_bench.report.tidy import LongRow, long_rows
from bdl_bench.report.tuning_budget import tuning_budget
from estimators.errors import OptionError

__all__ = ["Report", "build"]


@dataclass(frozen=True)
class Report:
    """The content of a report."""

    created: str
    summary: Summary | None
    tasks: list[TaskView]
    methods: dict[str, str]
    seeds: list[int]
    tuned: bool
    tuning_budget: str
    skipped: list[Record]
    failed: list[Record]
    unreadable: dict[str, str]
    environments: list[dict[str, str]]
    command: str
    numbers: list[LongRow]
    columns_are_selected: bool = False
    """Whether the columns of the tables were named, and so are all shown."""

    @property
    def n_compared(self) -> int:
        """The number of methods with a result on some task; others were skipped or failed everywhere."""
        return len({method for task in self.tasks for method in task.scores.untuned.entries})


def build(directory: Path, gallery: Gallery | None = None, selection: Selection = EVERYTHING) -> Report:
    """Return the report of the selected records in a directory; `gallery` can also save the figures.

    Raises:
        OptionError: for a directory without readable records, a selection that leaves none, and unknown names.
    """
    gallery = gallery or Gallery()
    store = RecordStore(directory)
    records, unreadable = selection.of_records(load_records(store)), store.unreadable()
    _check_any(records, unreadable)
    methods = _methods(records)
    palette = Palette(methods)
    views: list[TaskView] = []
    numbers: list[LongRow] = []
    grouped = group_by_task(store, records, selection)
    if selection.metrics is not None and grouped:
        selection.check_metrics(metric for results in grouped for metric in results.all_metrics)
    for index, results in enumerate(grouped):
        with styled():
            views.append(_task_view(Context(results, seed_design(results), palette, gallery), index, records))
        numbers += long_rows(results)
        results.release_arrays()
    return Report(
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        summary=summary(views, palette, gallery) if views else None,
        tasks=views,
        methods=methods,
        seeds=sorted({r.seed for r in records}),
        tuned=any(r.tuning is not None for r in records),
        tuning_budget=tuning_budget(records),
        skipped=[r for r in records if r.status == "skipped"],
        failed=[r for r in records if r.status == "failed"],
        unreadable=unreadable,
        environments=list({str(sorted(e.items())): e for r in records if (e := r.environment)}.values()),
        command=command(records),
        numbers=numbers,
        columns_are_selected=selection.metrics is not None,
    )


def _check_any(records: Sequence[Record], unreadable: Mapping[str, str]) -> None:
    if records:
        return
    files = [f"{name} ({reason})" for name, reason in unreadable.items()]
    raise OptionError(
        "a directory with records that this version can read",
        received=f"{len(files)} unreadable: {join_names(files, most=3)}" if files else "no record",
        remedy="run bdl-bench compare again with the same --out, or render with the version that wrote them.",
    )


def _task_view(context: Context, index: int, records: Sequence[Record]) -> TaskView:
    results: TaskResults = context.results
    table = scores(context)
    cost, exact = costs(context, table.compared), agreement(context)
    posterior = fidelity_section(context, records)
    sections: Sequence[Section | None] = (
        decisions(context),
        interventions(context),
        table,
        posterior,
        cost,
        calibration(context),
        selective(context),
        bands(context),
        out_of_distribution(context, table),
        shift(context),
        exact,
        disagreements(context),
        *custom_sections(context),
        tuning(context),
        configuration(context),
    )
    further = trained_further({s: r.training for seeds in results.finished.values() for s, r in seeds.items()})
    return TaskView(
        name=results.name,
        anchor=f"task-{index + 1}",
        summary=results.summary,
        kind=results.kind,
        seeds=results.seeds,
        findings=[
            *further,
            *context.design.warnings,
            *findings(table.compared, context.design, exact.rows, cost.rows),
            *overtuned(table.untuned, table.tuned),
        ],
        scores=table,
        costs=cost,
        agreement=exact,
        design=context.design,
        fidelity=posterior,
        sections=[section for section in sections if section is not None],
        with_variance=[m for m in results.methods if _has_variance(results, m)],
        trained_further=further,
    )


def _has_variance(results: TaskResults, method: str) -> bool:
    found = results.predictions(method, min(results.finished[method]))
    return "epistemic_variance" in found and bool(found["epistemic_variance"].any())


def _methods(records: Sequence[Record]) -> dict[str, str]:
    found = {r.method: r.method_summary for r in records}
    return {name: found[name] for name in [*(m for m in METHODS if m in found), *sorted(found.keys() - METHODS.keys())]}
