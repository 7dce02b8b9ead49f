"""Records: what one cell (task, method, seed) gave, as a JSON file and an .npz of per-example arrays beside it.

A record is valid for one content key: a digest of task, method, seed, problem and code. The JSON names the key and the
digest of its arrays, and is written after them, so that a record that can be read is complete.
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

from estimators.errors import StateError
from estimators.persistence.atomic import write_bytes, write_text
from estimators.persistence.checksums import digest

__all__ = ["ArrayFile", "Cost", "Record", "RecordStore", "Training", "Tuning", "content_key", "slug"]

ArrayFile = Mapping[str, NDArray[Any]]
Status = Literal["ok", "skipped", "failed"]


class Training(BaseModel):
    """How the MAP of one (task, seed) came about; `seconds` is None if the network came trained and was used as it is.

    `epochs` are those of the recipe. `loss_before` is the mean −log p of a training label, in nats, at the weights that
    the network came with; `further` says that these had been trained before: they do much better than no training.
    """

    seconds: float | None
    recipe: str | None
    epochs: int | None = None
    loss_before: float | None = None
    further: bool = False

    @property
    def summary(self) -> str:
        """One sentence."""
        if self.recipe is None:
            return "none: the network came trained and was used as it is"
        if self.epochs is None:  # of a record that does not say
            return self.recipe
        before = "" if self.loss_before is None else f" (mean −log p of a training label there: {self.loss_before:.3g})"
        start = f"{self.epochs} epochs by {self.recipe}, from the weights that the problem came with{before}"
        if not self.further:
            return f"trained for {start}"
        return f"trained further for {start}, which had been trained before; trained=True of Problem keeps them"


class Cost(BaseModel):
    """What a cell took: seconds of wall time, bytes of peak memory of the process and its rise above the start.

    `peak_reset` says that the peak was reset at the start of the cell; where not, it is the largest of the process
    so far and `peak_increase_bytes` is a lower bound. `device_peak_bytes` is the peak of the accelerator's allocator.
    `passes` counts what the fit sent through a network, in forwards and backwards of the training rows,
    `predict_passes` what the test rows took, solves at query time with them, `tuning_passes` all of tuning; None where
    it cannot be known. `exclusive`: no other job ran beside it, so that times mean what they say.
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


class Tuning(BaseModel):
    """What was tried on the validation rows: every point with its score (lower is better), and the one chosen.

    A point has a `value` on the axis (None where the method has no axis), `variance_scale`, `softmax_temperature` or
    `sigma_noise`, and `score`. `at_edge` names what was chosen at the end of its range; `refined` says that it lies
    between the points of the grid. `failures` are the values of the axis whose fit raised, with the reason. `fits` were
    made beside the given one. `where`: whether the weights stayed, "post hoc at fixed weights", or "with retraining".
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    axis: str | None = None
    unit: str | None = None
    points: list[dict[str, float | None]] = Field(default_factory=list)
    chosen: dict[str, float | None] = Field(default_factory=dict)
    at_edge: list[str] = Field(default_factory=list)
    refined: bool = False
    failures: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0
    fits: int = 0
    passes: float = 0.0
    score_name: str = "NLL"
    validation_rows: int = 0
    where: str = "post hoc at fixed weights"


class Record(BaseModel):
    """One cell. `metrics` under the names of the field, as fitted, and `tuned`; `reason` of a skip; `traceback`.

    `preflight` is what was found of the problem before its cells ran; `problem` is the content key of that problem;
    `task_code` and `method_code` are digests of the code and the options of the task and of the method; `timeout` the
    seconds that were not enough for it, of a cell that was skipped for them.
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
    problem: str = ""
    task_code: str = ""
    method_code: str = ""
    arrays: str | None = None
    arrays_digest: str | None = None


class RecordStore:
    """The records in a directory: `records/<task>/<method>.seed-<n>.json` and `.npz`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "records"

    def path(self, task: str, method: str, seed: int) -> Path:
        """Where the JSON of a cell lies."""
        return self.root / slug(task) / f"{slug(method)}.seed-{seed}.json"

    def write(self, record: Record, arrays: ArrayFile | None = None) -> Record:
        """Write arrays, then the record; return it with the name and digest of its arrays."""
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
        """The finished record of a cell if it has this key and its arrays are whole; else None."""
        record = self.finished(task, method, seed)
        return record if record is not None and record.key == key else None

    def read(self, task: str, method: str, seed: int) -> Record | None:
        """The record of a cell, whatever it says; None where there is none that can be read."""
        return _read(self.path(task, method, seed))

    def finished(self, task: str, method: str, seed: int) -> Record | None:
        """The record of a cell that ended well, whatever its key, if its arrays are whole; else None."""
        record = self.read(task, method, seed)
        return record if record is not None and record.status == "ok" and self.arrays_are_complete(record) else None

    def all(self) -> list[Record]:
        """Every readable record, by task, method and seed."""
        records = [_read(path) for path in self._paths()]
        return sorted((r for r in records if r is not None), key=lambda r: (r.task, r.method, r.seed))

    def unreadable(self) -> dict[str, str]:
        """Return why each file that cannot be read as a record cannot be, by its path in the directory."""
        found = ((path.relative_to(self.directory).as_posix(), _why_unreadable(path)) for path in self._paths())
        return {name: reason for name, reason in found if reason is not None}

    def written(self, record: Record) -> float:
        """When, in seconds since the epoch."""
        return self.path(record.task, record.method, record.seed).stat().st_mtime

    def arrays(self, record: Record) -> dict[str, NDArray[Any]]:
        """The per-example arrays of a record. Errors: StateError where the file is gone or damaged."""
        if record.arrays is None:
            return {}
        try:
            with open(self.directory / record.arrays, "rb") as content, np.load(content, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise StateError(
                f"the arrays of {record.task} {record.method} seed {record.seed} in {record.arrays}",
                received=f"{type(error).__name__}: {error}",
                remedy="the same command with the same --out makes them again.",
            ) from error

    def _paths(self) -> list[Path]:
        return sorted(self.root.rglob("*.json"))

    def arrays_are_complete(self, record: Record) -> bool:
        """Whether the arrays of a record are those that were written with it."""
        path = self.directory / (record.arrays or "")
        return path.is_file() and _digest(path.read_bytes()) == record.arrays_digest


def content_key(**parts: object) -> str:
    """A digest of named parts, sixteen hexadecimal digits."""
    text = "\n".join(f"{name}={value!r}" for name, value in sorted(parts.items()))
    return _digest(text.encode())


def slug(name: str) -> str:
    """A file name for any string: letters, digits, dash and underscore; a digest is added where that changed it."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60].strip("-")
    return safe if safe == name else f"{safe or 'x'}-{_digest(name.encode())[:8]}"


def _read(path: Path) -> Record | None:
    try:
        return Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _why_unreadable(path: Path) -> str | None:
    """The first thing that is wrong with a file; None for a record."""
    try:
        Record.model_validate_json(path.read_bytes())
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    return None


def _npz(arrays: ArrayFile) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))  # type: ignore[arg-type]
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return digest(content).hex()[:16]
