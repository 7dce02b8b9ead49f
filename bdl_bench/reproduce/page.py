"""A Markdown page of a published comparison: our numbers beside the published ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bdl_bench.markdown import markdown_table
from bdl_bench.records.record import Record, RecordStore
from bdl_bench.report.results import load_records
from bdl_bench.reproduce.published import Published
from bdl_bench.reproduce.studies import Study, StudyTask
from bdl_bench.stats.ties import is_tie

__all__ = ["page"]

_MARKS = {"inside": "", "below": " ↓", "above": " ↑"}
_LEGEND = (
    "Ours are means over the splits ± their standard error, of predictions tuned on the validation rows. Published "
    "bars are printed as they are. ↓ and ↑: our mean lies below or above the error bar of the published column of the "
    "same method, extended by the rounding of the printed digits. (n): fewer splits than the others of its row."
)


@dataclass(frozen=True)
class _Mean:
    """The mean of a metric over splits, its standard error (NaN for one split), and the number of splits."""

    value: float
    error: float
    n: int


def page(study: Study, directory: Path) -> str:
    """Return the page of the records in a directory, with what has run so far.

    Args:
        study: the comparison.
        directory: that `bdl-bench reproduce` wrote.

    Returns:
        Markdown. Runs that are not comparable with the newest one of their task are listed, and in no mean.
    """
    everything = _comparable(RecordStore(directory))
    records = [record for record in everything if record.status == "ok" and record.tuned]
    lines = [f"# {study.title}", "", f"Published: {study.source}.", "", _LEGEND, ""]
    lines += [f"- {note}" for note in study.notes]
    for protocol in study.protocols:
        tasks = [task for task in study.tasks if task.protocol == protocol]
        found = {task: _by_method(task, records) for task in tasks}
        found = {task: methods for task, methods in found.items() if methods}
        if found:
            lines += _section(study, protocol, found)
    lines += _unfinished(study, everything)
    return "\n".join(lines) + "\n"


def _comparable(store: RecordStore) -> list[Record]:
    """Return every record; one of other code, data or tuning budget than the newest of its task is returned as failed.

    The means of a table are over splits, so all of them must be of one experiment.
    """
    records = load_records(store)
    newest: dict[str, str | None] = {}
    for record in sorted((r for r in records if r.status == "ok"), key=store.written):
        newest[record.task] = _budget(record)
    return [record if _budget(record) == newest.get(record.task) else _stale(record) for record in records]


def _budget(record: Record) -> str | None:
    return record.configuration.get("tune_budget")


def _stale(record: Record) -> Record:
    if record.status != "ok":
        return record
    reason = "made with another tuning budget than the newest run of its task; to run it again, repeat the command."
    return record.model_copy(update={"status": "failed", "reason": reason})


def _unfinished(study: Study, records: Iterable[Record]) -> list[str]:
    """Return a line for each run that failed, was skipped or is not comparable; nothing if there is none."""
    tasks = {task.task for task in study.tasks}
    found = [record for record in records if record.task in tasks and record.status != "ok"]
    if not found:
        return []
    runs = [f"- {r.status}: {r.task}, split {r.seed}, `{r.method}`.{_first_sentence(r.reason)}" for r in found]
    return ["", "## Runs without a result", "", *runs]


def _first_sentence(reason: str | None) -> str:
    """Return the first sentence of a reason in one line, with a space before it; nothing without a reason."""
    text = " ".join((reason or "").split()).partition(". ")[0].rstrip(".")
    return f" {text}." if text else ""


def _by_method(task: StudyTask, records: Iterable[Record]) -> dict[str, list[Record]]:
    methods: dict[str, list[Record]] = {}
    for record in records:
        if record.task == task.task:
            methods.setdefault(record.method, []).append(record)
    return methods


def _section(study: Study, protocol: str, found: dict[StudyTask, dict[str, list[Record]]]) -> list[str]:
    ran = {name for methods in found.values() for name in methods}
    methods = [*(m for m in study.methods if m in ran), *sorted(ran - set(study.methods))]
    lines = ["", f"## {protocol} epochs" if protocol else "## Results"]
    for metric in ("RMSE", "NLL"):
        columns = list(next(iter(study.published[metric].values())))
        header = ["set", "splits", *(f"published: {name}" for name in columns), *(f"`{m}`" for m in methods)]
        value = _from_rmse if metric == "NLL" and study.nll_from_rmse else _metric(f"reg/{metric}")
        rows = []
        for task, by_method in found.items():
            published = study.published[metric][task.data]
            means = {m: _mean([value(r) for r in by_method.get(m, [])]) for m in methods}
            paired = {c.method: published[c.published] for c in study.columns[protocol]}
            rows.append([task.data, str(_most(means)), *(str(published[name]) for name in columns),
                         *_entries(means, paired)])  # fmt: skip
        lines += ["", f"### {_title(study, metric)}", "", *markdown_table(header, rows, align_right=True)]
    extra = [("Coverage of 90 % conformal intervals", "cp/coverage"), ("Width of these intervals", "cp/width")]
    if study.nll_from_rmse:
        extra.insert(0, ("NLL of the predicted distribution", "reg/NLL"))
    for title, key in extra:
        rows = [
            [task.data, *_entries({m: _mean([_metric(key)(r) for r in by_method.get(m, [])]) for m in methods}, {})]
            for task, by_method in found.items()
        ]
        lines += ["", f"### {title}", "", *markdown_table(["set", *(f"`{m}`" for m in methods)], rows,
                                                          align_right=True)]  # fmt: skip
    return [*lines, *_verdicts(study, protocol, found)]


def _verdicts(study: Study, protocol: str, found: dict[StudyTask, dict[str, list[Record]]]) -> list[str]:
    """Return a line for each method with a published column that ran: on how many sets its RMSE is inside the bar."""
    lines: list[str] = []
    for column in study.columns[protocol]:
        positions: dict[str, list[str]] = {"inside": [], "below": [], "above": []}
        for task, by_method in found.items():
            mean = _mean([_metric("reg/RMSE")(r) for r in by_method.get(column.method, [])])
            if mean is not None:
                positions[study.published["RMSE"][task.data][column.published].position(mean.value)].append(task.data)
        words = "; ".join(f"{name}: {', '.join(sets)}" for name, sets in positions.items() if sets)
        total = sum(map(len, positions.values()))
        if not total:
            continue
        lines.append(
            f"- `{column.method}` and {column.published}: {len(positions['inside'])} of {total} sets. {words}."
        )
    return ["", "### Inside the published error bars (RMSE)", "", *lines] if lines else []


def _title(study: Study, metric: str) -> str:
    if metric == "NLL" and study.nll_from_rmse:
        return "NLL with σ = RMSE of the test rows"
    return metric


def _metric(key: str) -> Callable[[Record], float]:
    return lambda record: record.tuned.get(key, math.nan)


def _from_rmse(record: Record) -> float:
    return 0.5 * math.log(2 * math.pi * math.e) + math.log(record.tuned["reg/RMSE"])


def _mean(values: Sequence[float]) -> _Mean | None:
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return None
    error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan
    return _Mean(float(known.mean()), error, len(known))


def _most(means: dict[str, _Mean | None]) -> int:
    return max((mean.n for mean in means.values() if mean is not None), default=0)


def _entries(means: dict[str, _Mean | None], paired: dict[str, Published]) -> list[str]:
    entries = []
    for method, mean in means.items():
        if mean is None:
            entries.append("–")
            continue
        mark = _MARKS[paired[method].position(mean.value)] if method in paired else ""
        fewer = f" ({mean.n})" if mean.n < _most(means) else ""
        entries.append(f"{_number(mean)}{mark}{fewer}")
    return entries


def _number(mean: _Mean) -> str:
    """Return the mean with two digits of its error, and at least two decimals of both."""
    error = 0.0 if math.isnan(mean.error) or is_tie(mean.error, 0.0) else mean.error
    digits = 2 if error <= 0 else min(5, max(2, 1 - math.floor(math.log10(error))))
    digits = max(digits, 2 if abs(mean.value) >= 0.1 else 4)
    return f"{mean.value:.{digits}f}" + (f" ± {error:.{digits}f}" if error > 0 else "")
