"""What the report shows, as plain data: built once from records, rendered as HTML, Markdown and CSV."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bdl_bench.methods import BASELINE, METHODS, REFERENCE
from bdl_bench.records import Record, RecordStore
from bdl_bench.report.figures import (
    Picture,
    coverage_picture,
    first_confidence,
    reliability_picture,
    scatter_picture,
)
from bdl_bench.report.findings import findings
from bdl_bench.report.quality import AgreementRow, CostRow, agreement_rows, cost_rows
from bdl_bench.report.results import TaskResults, gather
from bdl_bench.report.scores import ScoreTable, score_table
from bdl_bench.tasks import TASKS

__all__ = ["Report", "TaskView", "build"]


@dataclass(frozen=True)
class TaskView:
    """One task: tables, pictures and the sentences drawn from them."""

    name: str
    anchor: str
    summary: str
    kind: str
    seeds: list[int]
    configuration: dict[str, str]
    training: str
    scores: ScoreTable
    agreements: list[AgreementRow]
    costs: list[CostRow]
    findings: list[str]
    calibration: list[Picture]
    scatters: list[Picture]
    fit_reports: dict[str, dict[str, str]]
    incomplete: dict[str, int]
    """Finished seeds of methods that miss some."""


@dataclass(frozen=True)
class Report:
    """A whole report."""

    created: str
    tasks: list[TaskView]
    methods: dict[str, str]
    seeds: list[int]
    skipped: list[Record]
    failed: list[Record]
    environments: list[dict[str, str]]
    command: str
    reference: str = REFERENCE


def build(directory: Path) -> Report:
    """The report of every record in a directory."""
    store = RecordStore(directory)
    records = store.all()
    views = [_task_view(results, index) for index, results in enumerate(gather(store, records))]
    return Report(
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        tasks=views,
        methods={name: summary for name, summary in _methods(records).items()},
        seeds=sorted({r.seed for r in records}),
        skipped=[r for r in records if r.status == "skipped"],
        failed=[r for r in records if r.status == "failed"],
        environments=_unique([r.environment for r in records]),
        command=_command(records),
    )


def _task_view(results: TaskResults, index: int) -> TaskView:
    scores, agreements, costs = score_table(results), agreement_rows(results), cost_rows(results)
    first = next(iter(next(iter(results.done.values())).values()))
    return TaskView(
        name=results.name,
        anchor=f"task-{index + 1}",
        summary=results.summary,
        kind=results.kind,
        seeds=results.seeds,
        configuration=first.configuration,
        training=_training(results),
        scores=scores,
        agreements=agreements,
        costs=costs,
        findings=findings(scores, agreements, costs),
        calibration=_calibration(results),
        scatters=_scatters(results),
        fit_reports={m: next(iter(seeds.values())).fit_report for m, seeds in results.done.items()},
        incomplete={m: len(s) for m, s in results.done.items() if len(s) < len(results.seeds)},
    )


def _training(results: TaskResults) -> str:
    trainings = [r.training for seeds in results.done.values() for r in seeds.values() if r.training is not None]
    recipes = [t.recipe for t in trainings if t.recipe is not None]
    return recipes[0] if recipes else "none: the network came trained"


def _calibration(results: TaskResults) -> list[Picture]:
    pooled = {method: results.pooled(method) for method in results.methods}
    baseline = pooled.get(BASELINE)
    if results.kind == "regression":
        return [coverage_picture(m, a, baseline if m != BASELINE else None) for m, a in pooled.items()]
    start = first_confidence(list(pooled.values()))
    return [reliability_picture(m, a, baseline if m != BASELINE else None, start=start) for m, a in pooled.items()]


def _scatters(results: TaskResults) -> list[Picture]:
    pictures = []
    for method in results.methods:
        shared = results.shared_seeds(method, REFERENCE)
        if method != REFERENCE and shared:
            pair = (results.arrays(name, shared[0])["epistemic_variance"] for name in (method, REFERENCE))
            pictures.append(scatter_picture(method, *pair))
    return [picture for picture in pictures if picture is not None]


def _methods(records: Sequence[Record]) -> dict[str, str]:
    found = {r.method: r.method_summary for r in records}
    return {name: found[name] for name in [*(m for m in METHODS if m in found), *sorted(found.keys() - METHODS.keys())]}


def _unique(environments: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return list({tuple(sorted(e.items())): e for e in environments if e}.values())


def _command(records: Sequence[Record]) -> str:
    """The command that runs this grid again."""
    tasks = sorted({r.task for r in records})
    seeds = sorted({r.seed for r in records})
    words = ["bdl-bench", "compare", *(t for t in tasks if t in TASKS)]
    for task in tasks:
        words += [] if task in TASKS else ["--model", task]
    words += ["--methods", ",".join(_methods(records))]
    words += ["--seeds", str(max(seeds, default=0) + 1)]
    return shlex.join(words)
