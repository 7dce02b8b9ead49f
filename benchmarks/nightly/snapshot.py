"""The results of one version in a small file: scores by task, method and seed, and what produced them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bdl_bench.records.record import RecordStore
from bdl_bench.report.results import TaskResults, group_by_task, load_records
from estimators.errors import StateError
from estimators.persistence.atomic import write_text

__all__ = ["KEYS", "LIKELIHOODS", "MethodResult", "Snapshot", "load", "of_run", "save"]

LIKELIHOODS = ("reg/NLL", "cls/NLL")
"""The negative log-likelihoods, by which changes are judged."""
KEYS = (*LIKELIHOODS, "reg/RMSE", "cls/Acc")
"""The metrics that are kept."""


@dataclass(frozen=True)
class MethodResult:
    """One method on one task.

    Args:
        scores: value by metric and seed, tuned on the validation rows if every method of the task was.
        seconds: to fit, tune and predict, median over seeds.
    """

    scores: dict[str, dict[str, float]]
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """The results of one version.

    Args:
        version: of the software.
        date: UTC day of the newest run, as "2026-11-30".
        environment: versions of packages and the system, by name.
        tasks: results by task and method.
    """

    version: str
    date: str
    environment: dict[str, str]
    tasks: dict[str, dict[str, MethodResult]]


def of_run(directory: Path) -> Snapshot:
    """Return the snapshot of a directory that `bdl-bench compare` wrote.

    Args:
        directory: of the run.

    Returns:
        The results of all runs that finished.

    Raises:
        StateError: if no run finished.
    """
    store = RecordStore(directory)
    records = load_records(store)
    finished = [record for record in records if record.status == "ok"]
    if not finished:
        raise StateError(
            "a directory with finished runs", received=str(directory), remedy="python -m benchmarks.nightly runs them."
        )
    newest = max(finished, key=store.written)
    day = datetime.fromtimestamp(store.written(newest), UTC).date().isoformat()
    tasks = {results.name: _methods(results) for results in group_by_task(store, records)}
    return Snapshot(newest.environment.get("bdl-bench", "unknown"), day, newest.environment, tasks)


def save(snapshot: Snapshot, folder: Path) -> Path:
    """Write a snapshot as FOLDER/VERSION.json, whole or not at all, and return the path."""
    path = folder / f"{snapshot.version}.json"
    write_text(path, json.dumps(asdict(snapshot), indent=1) + "\n")
    return path


def load(folder: Path) -> list[Snapshot]:
    """Return the snapshots of a folder, the oldest first."""
    found = [_from_json(json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    return sorted(found, key=lambda snapshot: (snapshot.date, snapshot.version))


def _from_json(read: dict[str, Any]) -> Snapshot:
    tasks = {
        task: {method: MethodResult(**result) for method, result in methods.items()}
        for task, methods in read["tasks"].items()
    }
    return Snapshot(read["version"], read["date"], read["environment"], tasks)


def _methods(results: TaskResults) -> dict[str, MethodResult]:
    return {
        method: MethodResult(
            _scores(results, method), median(record.cost.total_seconds for record in runs.values() if record.cost)
        )
        for method, runs in results.finished.items()
    }


def _scores(results: TaskResults, method: str) -> dict[str, dict[str, float]]:
    by_seed = {
        str(seed): results.metric_values(method, seed, tuned=results.all_tuned)
        for seed in sorted(results.finished[method])
    }
    found = {key: {seed: values[key] for seed, values in by_seed.items() if key in values} for key in KEYS}
    return {key: values for key, values in found.items() if values}
