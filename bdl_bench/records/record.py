"""Records: the result of one run (task, method, seed), as a JSON file and an .npz file of per-example arrays.

A record is valid for one content key: a digest of task, method, seed, problem and code. The JSON file has the key and
the digest of the arrays. It is written after them, so a record that can be read is complete.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bdl_bench.metrics import METRICS
from estimators.errors import StateError
from estimators.persistence.atomic import write_bytes, write_text
from estimators.persistence.checksums import digest

__all__ = [
    "ArrayFile",
    "Convergence",
    "Cost",
    "OwnMetric",
    "Record",
    "RecordStore",
    "Training",
    "Tuning",
    "content_key",
    "slug",
]

ArrayFile = Mapping[str, NDArray[Any]]
Status = Literal["ok", "skipped", "failed"]


class Convergence(BaseModel):
    """How training was continued by full-batch L-BFGS, as `estimators.training.converge` reports it.

    Attributes:
        relative_gradient: ‖∇L‖ / ‖δ(θ − θ₀)‖ at the end.
        tolerance: the relative gradient that was asked for.
        iterations: number of L-BFGS iterations.
        gradients: number of gradients over all training rows.
    """

    relative_gradient: float
    tolerance: float
    iterations: int
    gradients: int

    @property
    def reached(self) -> bool:
        """Whether the relative gradient is at most the tolerance."""
        return self.relative_gradient <= self.tolerance

    @property
    def summary(self) -> str:
        """Return the end of a sentence for the report."""
        missed = "" if self.reached else f", above the tolerance of {self.tolerance:.2g}"
        return f"then {self.iterations} iterations of full-batch L-BFGS, to a relative gradient of " + (
            f"{self.relative_gradient:.2g}{missed}"
        )


class Training(BaseModel):
    """How the network of one (task, seed) was trained.

    Attributes:
        seconds: wall time; None if the problem brought a trained network.
        recipe: the recipe as text; None if the problem brought a trained network.
        epochs: number of epochs of the recipe.
        loss_before: mean −log p of a training label, in nats, at the weights before training.
        further: whether these weights had been trained before, judged by their loss.
        convergence: how training was continued to a stationary point of L; None if it was not.
    """

    seconds: float | None
    recipe: str | None
    epochs: int | None = None
    loss_before: float | None = None
    further: bool = False
    convergence: Convergence | None = None

    @property
    def summary(self) -> str:
        """Return a sentence for the report."""
        after = "" if self.convergence is None else f"; {self.convergence.summary}"
        return f"{self._by_recipe}{after}"

    @property
    def _by_recipe(self) -> str:
        if self.recipe is None:
            return "none: the network came trained and was used as it is"
        if self.epochs is None:  # an older record
            return self.recipe
        before = "" if self.loss_before is None else f" (mean −log p of a training label there: {self.loss_before:.3g})"
        start = f"{self.epochs} epochs by {self.recipe}, from the weights that the problem came with{before}"
        if not self.further:
            return f"trained for {start}"
        return f"trained further for {start}, which had been trained before; trained=True of Problem keeps them"


class Cost(BaseModel):
    """The cost of one run.

    Attributes:
        fit_seconds: wall time of the fit.
        predict_seconds: wall time of predicting the test rows.
        peak_bytes: peak resident memory of the process.
        peak_increase_bytes: increase in resident memory, from the start to the peak.
        peak_reset: whether the peak was reset at the start. If not, `peak_bytes` is the largest of the process so far
            and `peak_increase_bytes` a lower bound.
        device_peak_bytes: peak memory of the accelerator; None on the CPU.
        passes: forward and backward passes of the fit, in epoch equivalents; None if unknown.
        predict_passes: passes of predicting the test rows, solves at query time included; None if unknown.
        tuning_seconds: wall time of tuning.
        tuning_passes: passes of tuning.
        exclusive: whether no other job ran at the same time, so that times are comparable.
    """

    fit_seconds: float
    predict_seconds: float
    peak_bytes: int
    peak_increase_bytes: int
    peak_reset: bool
    device_peak_bytes: int | None = None
    passes: float | None = None
    predict_passes: float | None = None
    tuning_seconds: float | None = None
    tuning_passes: float | None = None
    exclusive: bool = True

    @property
    def total_seconds(self) -> float:
        """Seconds to fit, tune and predict."""
        return self.fit_seconds + (self.tuning_seconds or 0.0) + self.predict_seconds


class Tuning(BaseModel):
    """What was tried on the validation rows, and what was chosen.

    Attributes:
        option: the tuned option of the method; None if only predictions were calibrated.
        unit: unit of the option.
        points: every point: `value` of the option, `variance_scale`, `softmax_temperature` or `sigma_noise`, and
            `score` (lower is better).
        chosen: the chosen point.
        at_boundary: names of what was chosen at the end of its range.
        refined: whether the chosen point lies between the points of the grid.
        failures: the reason for each value of the option whose fit raised.
        seconds: wall time.
        fits: number of fits, without the given one.
        passes: forward and backward passes, in epoch equivalents.
        score_name: name of the score.
        validation_rows: number of validation rows.
        refit_kind: "post hoc at fixed weights", or "with retraining".
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    option: str | None = None
    unit: str | None = None
    points: list[dict[str, float | None]] = Field(default_factory=list)
    chosen: dict[str, float | None] = Field(default_factory=dict)
    at_boundary: list[str] = Field(default_factory=list)
    refined: bool = False
    failures: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0
    fits: int = 0
    passes: float = 0.0
    score_name: str = "NLL"
    validation_rows: int = 0
    refit_kind: str = "post hoc at fixed weights"


class OwnMetric(BaseModel):
    """A metric of a plugin, as a table shows it where the plugin is not loaded.

    Attributes:
        label: the name in a table.
        reading: how to read the number.
        better: which direction is better; None if neither is.
        relevant: the smallest relevant difference; None: 1 % of the value of the baseline.
    """

    label: str
    reading: str
    better: Literal["lower", "higher"] | None = None
    relevant: float | None = None


class Record(BaseModel):
    """The result of one run.

    Attributes:
        key: content key; the record is valid for it alone.
        task: name of the task.
        task_summary: what the task is.
        method: name of the method.
        method_summary: what the method is.
        seed: seed of the run.
        status: "ok", "skipped" or "failed".
        kind: kind of the likelihood.
        reason: why the run was skipped or failed.
        traceback: where it failed.
        timeout: seconds that were not enough, if the run was skipped for its timeout.
        metrics: metrics of the untuned predictions, by name.
        tuned: metrics of the tuned predictions, by name.
        tuning: how it was tuned.
        cost: what it cost.
        training: how the network was trained.
        configuration: options of problem, method and machine, by name.
        fit_report: what the fit reports, by name.
        environment: versions of packages and code.
        preflight: findings of the pre-flight diagnostics, by name.
        relative_gradient: ‖∇L‖ / ‖δ(θ − θ₀)‖ at the weights that all methods start from; None if unknown.
        problem: content key of the problem.
        task_code: digest of the code and options of the task.
        method_code: digest of the code and options of the method.
        own_metrics: the metrics of plugins among `metrics` and `tuned`, by key.
        plugins: the plugins of the "task", the "method" and of each "metric <key>", if they came from one.
        arrays: path of the arrays in the directory.
        arrays_digest: digest of the arrays.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    key: str
    task: str
    task_summary: str
    method: str
    method_summary: str
    seed: int
    status: Status
    kind: str | None = None
    reason: str | None = None
    traceback: str | None = None
    timeout: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    tuned: dict[str, float] = Field(default_factory=dict)
    tuning: Tuning | None = None
    cost: Cost | None = None
    training: Training | None = None
    configuration: dict[str, str] = Field(default_factory=dict)
    fit_report: dict[str, str] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    preflight: dict[str, str] = Field(default_factory=dict)
    relative_gradient: float | None = None
    problem: str = ""
    task_code: str = ""
    method_code: str = ""
    own_metrics: dict[str, OwnMetric] = Field(default_factory=dict)
    plugins: dict[str, str] = Field(default_factory=dict)
    arrays: str | None = None
    arrays_digest: str | None = None


class RecordStore:
    """The records in a directory: `records/<task>/<method>.seed-<n>.json` and `.npz`.

    Args:
        directory: the directory of a grid.

    Example:
        >>> from pathlib import Path
        >>> RecordStore(Path("results")).path("diabetes", "laplace", 0).as_posix()
        'results/records/diabetes/laplace.seed-0.json'
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "records"

    def path(self, task: str, method: str, seed: int) -> Path:
        """Return the path of a record.

        Args:
            task: name of the task.
            method: name of the method.
            seed: seed of the run.

        Returns:
            The path of the JSON file.
        """
        return self.root / slug(task) / f"{slug(method)}.seed-{seed}.json"

    def write(self, record: Record, arrays: ArrayFile | None = None) -> Record:
        """Write the arrays, then the record.

        Args:
            record: the record.
            arrays: arrays by name.

        Returns:
            The record with the path and digest of its arrays.
        """
        path = self.path(record.task, record.method, record.seed)
        if arrays:
            content = _npz(arrays)
            target = path.with_suffix(".npz")
            write_bytes(target, content)
            names = {"arrays": target.relative_to(self.directory).as_posix(), "arrays_digest": _digest(content)}
            record = record.model_copy(update=names)
        write_text(path, record.model_dump_json(indent=1))
        return record

    def valid(self, task: str, method: str, seed: int, *, key: str) -> Record | None:
        """Return the record of a run if its status is "ok", it has this key, and its arrays are complete.

        Args:
            task: name of the task.
            method: name of the method.
            seed: seed of the run.
            key: the content key.

        Returns:
            The record; None if there is no such record.
        """
        record = self.finished(task, method, seed)
        return record if record is not None and record.key == key else None

    def read(self, task: str, method: str, seed: int) -> Record | None:
        """Return the record of a run with any status.

        Args:
            task: name of the task.
            method: name of the method.
            seed: seed of the run.

        Returns:
            The record; None if it is missing or unreadable.
        """
        found = _read(self.path(task, method, seed))
        return found if isinstance(found, Record) else None

    def finished(self, task: str, method: str, seed: int) -> Record | None:
        """Return the record of a run if its status is "ok" and its arrays are complete, with any key.

        Args:
            task: name of the task.
            method: name of the method.
            seed: seed of the run.

        Returns:
            The record; None if there is no such record.
        """
        record = self.read(task, method, seed)
        return record if record is not None and record.status == "ok" and self.arrays_are_complete(record) else None

    def all(self) -> list[Record]:
        """Read all records.

        Returns:
            Every readable record, sorted by task, method and seed.
        """
        found = map(_read, self._paths())
        return sorted((r for r in found if isinstance(r, Record)), key=lambda r: (r.task, r.method, r.seed))

    def unreadable(self) -> dict[str, str]:
        """Find files that are not valid records.

        Returns:
            The reason for each, by its path in the directory.
        """
        found = ((path.relative_to(self.directory).as_posix(), _read(path)) for path in self._paths())
        return {name: reason for name, reason in found if isinstance(reason, str)}

    def written(self, record: Record) -> float:
        """Return when a record was written.

        Args:
            record: a record of this directory.

        Returns:
            Seconds since the epoch.
        """
        return self.path(record.task, record.method, record.seed).stat().st_mtime

    def arrays(self, record: Record) -> dict[str, NDArray[Any]]:
        """Read the per-example arrays of a record.

        Args:
            record: a record of this directory.

        Returns:
            Arrays by name.

        Raises:
            StateError: the file is missing or damaged.
        """
        if record.arrays is None:
            return {}
        try:
            with open(self.directory / record.arrays, "rb") as content, np.load(content, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise StateError(
                f"the arrays of {record.task} {record.method} seed {record.seed} in {record.arrays}",
                received=f"{type(error).__name__}: {error}",
                remedy="repeat the command with the same --out.",
            ) from error

    def _paths(self) -> list[Path]:
        return sorted(self.root.rglob("*.json"))

    def arrays_are_complete(self, record: Record) -> bool:
        """Check the arrays of a record against its digest.

        Args:
            record: a record of this directory.

        Returns:
            Whether they are those that were written with it.
        """
        path = self.directory / (record.arrays or "")
        return path.is_file() and _digest(path.read_bytes()) == record.arrays_digest


def content_key(**parts: object) -> str:
    """Return a digest of named parts, 16 hexadecimal digits."""
    text = "\n".join(f"{name}={value!r}" for name, value in sorted(parts.items()))
    return _digest(text.encode())


def slug(name: str) -> str:
    """Return a file name of letters, digits, dashes and underscores for a string, with a digest if that changed it."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60].strip("-")
    return safe if safe == name else f"{safe or 'x'}-{_digest(name.encode())[:8]}"


def _read(path: Path) -> Record | str:
    """Return the record in a file; for another file, the first error in it."""
    try:
        return _of_known_kind(Record.model_validate_json(path.read_bytes()))
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}" if where else str(first["msg"])


def _of_known_kind(record: Record) -> Record | str:
    if record.kind is None or record.kind in METRICS:
        return record
    return f"kind: expected {', '.join(METRICS)}, received {record.kind!r}"


def _npz(arrays: ArrayFile) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))  # type: ignore[arg-type]
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return digest(content).hex()[:16]
