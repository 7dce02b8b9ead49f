"""A tuned estimator as plain data: the fit as it saves itself, its calibration and the table of tuning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from estimators.errors import OptionError, StateError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.refitting import rebuilt
from estimators.likelihoods import Gaussian
from estimators.option_checks import as_number
from estimators.persistence.option_values import described, in_words
from estimators.persistence.state import TUNING, FittedState
from estimators.tuning.calibration import Calibration
from estimators.tuning.grid import CalibrationGrid
from estimators.tuning.tuned_option import TunedOption

if TYPE_CHECKING:
    from estimators.tuning.trials import Point

__all__ = ["StoredTuning", "as_tuned", "stored_tuning"]

E = TypeVar("E", bound=UncertaintyEstimator)

FORMAT = 1
_PREFIX = "tuning/"  # of the names of its tensors


@dataclass(frozen=True)
class StoredTuning:
    """What a tuned estimator has beside its fit."""

    calibration: Calibration
    axis: TunedOption
    curve: tuple[Point, ...]
    chosen: int
    seconds: float
    validation_rows: int


def stored_tuning(tuning: StoredTuning) -> FittedState:
    """Return the entries of a state: tensors by name, and a JSON text under "tuning"."""
    writer = _Writer()
    content = {
        "format": FORMAT,
        "axis": tuning.axis.name,
        "calibration": writer.calibration(tuning.calibration),
        "curve": [writer.point(point) for point in tuning.curve],
        "chosen": tuning.chosen,
        "seconds": tuning.seconds,
        "validation_rows": tuning.validation_rows,
    }
    return {**writer.tensors, TUNING: json.dumps(content)}


class _Writer:
    """JSON values; the tensors among them, by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def calibration(self, calibration: Calibration | None) -> dict[str, Any] | None:
        if calibration is None:
            return None
        plain = {name: value for name, value in vars(calibration).items() if name not in ("grid", "scores")}
        return {**plain, "grid": asdict(calibration.grid), "scores": self._kept(calibration.scores)}

    def point(self, point: Point) -> dict[str, Any]:
        plain = {name: value for name, value in vars(point).items() if name not in ("value", "calibration")}
        return {**plain, "value": self.value(point.value), "calibration": self.calibration(point.calibration)}

    def value(self, value: Any) -> Any:  # noqa: ANN401
        """Of the axis. What is no plain data, such as a solver, is kept by its description."""
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
            return {"tensor": self._kept(torch.as_tensor(value).detach())}
        if (number := as_number(value)) is not None:
            return number
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"mapping": [[key, self.value(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [self.value(item) for item in value]}
        return {"described": described(value)}

    def _kept(self, tensor: Tensor) -> str:
        name = f"{_PREFIX}{len(self.tensors)}"
        self.tensors[name] = tensor
        return name


def as_tuned(state: Mapping[str, Tensor | str], estimator: E) -> tuple[E, StoredTuning]:
    """Return the fit in a state, made of the options of `estimator` and the value that was chosen, and its tuning.

    Raises:
        StateError: for the state of a fit that was not tuned, and for one of other options.
        ModelChangedError: for one of another model.
    """
    content = _content(state)
    reader = _Reader(state)
    axis, chosen = TunedOption(content["axis"]), content["chosen"]
    fit = {name: value for name, value in state.items() if name != TUNING and not name.startswith(_PREFIX)}
    fitted = _with_value(estimator, axis, reader.value(content["curve"][chosen]["value"])).load_state_dict(fit)
    curve = tuple(reader.point(point) for point in content["curve"])
    calibration = reader.calibration(content["calibration"])
    assert calibration is not None
    return fitted, StoredTuning(calibration, axis, curve, chosen, content["seconds"], content["validation_rows"])


def _content(state: Mapping[str, Tensor | str]) -> dict[str, Any]:
    text = state.get(TUNING)
    if not isinstance(text, str):
        raise StateError(
            "the state of a tuned estimator, from Tuned.save()",
            received="that of a fit which was not tuned",
            remedy="estimator.load(path).",
        )
    try:
        content: dict[str, Any] = json.loads(text)
        if content["format"] == FORMAT:
            return content
    except (ValueError, TypeError, KeyError):
        pass
    raise StateError(
        f"a tuning of format {FORMAT}", received="another one", remedy="tune again, or load it with its own version."
    )


class _Reader:
    """The values that a `_Writer` gave."""

    def __init__(self, state: Mapping[str, Tensor | str]) -> None:
        self.state = state

    def calibration(self, stored: dict[str, Any] | None) -> Calibration | None:
        if stored is None:
            return None
        grid = CalibrationGrid(**{name: tuple(values) for name, values in stored["grid"].items()})
        return Calibration(**{**stored, "grid": grid, "scores": self._tensor(stored["scores"])})

    def point(self, stored: dict[str, Any]) -> Point:
        from estimators.tuning.trials import Point

        value = self.value(stored["value"])
        value = in_words(value.description) if isinstance(value, _Described) else value
        return Point(**{**stored, "value": value, "calibration": self.calibration(stored["calibration"])})

    def value(self, stored: Any) -> Any:  # noqa: ANN401
        """Of the axis; of what is no plain data its description."""
        if not isinstance(stored, dict):
            return stored
        if "tensor" in stored:
            return self._tensor(stored["tensor"])
        if "mapping" in stored:
            return {key: self.value(item) for key, item in stored["mapping"]}
        if "list" in stored:
            return [self.value(item) for item in stored["list"]]
        return _Described(stored["described"])

    def _tensor(self, name: str) -> Tensor:
        tensor = self.state[name]
        assert isinstance(tensor, Tensor)
        return tensor


@dataclass(frozen=True)
class _Described:
    """A value that can be recognised, and not made."""

    description: Any


def _with_value(estimator: E, axis: TunedOption, value: Any) -> E:  # noqa: ANN401
    """A new estimator with that value of the axis, not fitted."""
    if axis.name is None:
        return _rebuilt(estimator, {})
    if not isinstance(value, _Described):
        option = {"likelihood": Gaussian(value)} if axis.name == "sigma_noise" else {axis.name: value}
        return _rebuilt(estimator, option)
    given = axis.value_of(estimator)
    if described(given) != value.description:
        raise StateError(
            f"an estimator with the {axis.name} that was chosen, {in_words(value.description)}, which no file can keep",
            received=in_words(described(given)),
            remedy="construct it with that one.",
        )
    return _rebuilt(estimator, {})


def _rebuilt(estimator: E, options: dict[str, Any]) -> E:
    """`rebuilt`, for options that a file named."""
    try:
        made: E = rebuilt(estimator, options)
    except OptionError as error:
        raise StateError(
            f"an estimator with the option that was tuned, {', '.join(options)}",
            received=f"a {type(estimator).__name__}: {error.received}",
            remedy="load it into the estimator that was tuned.",
        ) from error
    return made
