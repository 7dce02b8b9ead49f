"""A tuned estimator as plain data: its calibration and trials as tensors and a JSON text, beside the saved fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from estimators.errors import OptionError, StateError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.cloning import clone
from estimators.likelihoods import Gaussian
from estimators.option_checks import as_number
from estimators.persistence.option_values import described, in_words
from estimators.persistence.state import TUNING, FittedState
from estimators.tuning.calibration import Calibration
from estimators.tuning.grid import CalibrationGrid
from estimators.tuning.trials import Trial
from estimators.tuning.tuned_option import TunedOption

__all__ = ["decode_tuning", "encode_tuning"]

E = TypeVar("E", bound=UncertaintyEstimator)

FORMAT = 2
_PREFIX = "tuning/"
"""The prefix of the names of tensors that belong to the tuning."""


def encode_tuning(
    *,
    calibration: Calibration,
    option: TunedOption,
    trials: tuple[Trial, ...],
    chosen: Trial,
    seconds: float,
    validation_rows: int,
) -> FittedState:
    """Return the entries of a state: tensors by name, and a JSON text under "tuning"."""
    encoder = _Encoder()
    content = {
        "format": FORMAT,
        "option": option.name,
        "calibration": encoder.calibration(calibration),
        "trials": [encoder.trial(trial) for trial in trials],
        "chosen": next(i for i, trial in enumerate(trials) if trial is chosen),
        "seconds": seconds,
        "validation_rows": validation_rows,
    }
    return {**encoder.tensors, TUNING: json.dumps(content)}


class _Encoder:
    """Converts values to JSON types, and collects the tensors among them by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def calibration(self, calibration: Calibration | None) -> dict[str, Any] | None:
        if calibration is None:
            return None
        plain = {name: value for name, value in vars(calibration).items() if name not in ("grid", "scores")}
        return {**plain, "grid": asdict(calibration.grid), "scores": self._add(calibration.scores)}

    def trial(self, trial: Trial) -> dict[str, Any]:
        plain = {name: value for name, value in vars(trial).items() if name not in ("value", "calibration")}
        return {**plain, "value": self.value(trial.value), "calibration": self.calibration(trial.calibration)}

    def value(self, value: Any) -> Any:  # noqa: ANN401
        """Encode a value of the tuned option. An object, such as a solver, is encoded by its description."""
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
            return {"tensor": self._add(torch.as_tensor(value).detach())}
        if (number := as_number(value)) is not None:
            return number
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"mapping": [[key, self.value(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [self.value(item) for item in value]}
        return {"described": described(value)}

    def _add(self, tensor: Tensor) -> str:
        name = f"{_PREFIX}{len(self.tensors)}"
        self.tensors[name] = tensor
        return name


def decode_tuning(state: Mapping[str, Tensor | str], estimator: E) -> tuple[E, dict[str, Any]]:
    """Return the fit in a state, and the arguments of `encode_tuning`.

    The fit has the options of `estimator` and the chosen value of the tuned option.

    Raises:
        StateError: for the state of a fit that was not tuned, or of other options.
        ModelChangedError: for the state of another model.
    """
    content = _content(state)
    decoder = _Decoder(state)
    option = TunedOption(content["option"])
    fit = {name: value for name, value in state.items() if name != TUNING and not name.startswith(_PREFIX)}
    value = decoder.value(content["trials"][content["chosen"]]["value"])
    fitted = _clone_with_value(estimator, option, value).load_state_dict(fit)
    trials = tuple(decoder.trial(trial) for trial in content["trials"])
    return fitted, {
        "calibration": decoder.calibration(content["calibration"]),
        "option": option,
        "trials": trials,
        "chosen": trials[content["chosen"]],
        "seconds": content["seconds"],
        "validation_rows": content["validation_rows"],
    }


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


class _Decoder:
    """Converts back what an `_Encoder` made."""

    def __init__(self, state: Mapping[str, Tensor | str]) -> None:
        self.state = state

    def calibration(self, stored: dict[str, Any] | None) -> Calibration | None:
        if stored is None:
            return None
        grid = CalibrationGrid(**{name: tuple(values) for name, values in stored["grid"].items()})
        return Calibration(**{**stored, "grid": grid, "scores": self._tensor(stored["scores"])})

    def trial(self, stored: dict[str, Any]) -> Trial:
        value = self.value(stored["value"])
        value = in_words(value.description) if isinstance(value, _Described) else value
        return Trial(**{**stored, "value": value, "calibration": self.calibration(stored["calibration"])})

    def value(self, stored: Any) -> Any:  # noqa: ANN401
        """Decode a value of the tuned option. An object is represented by its description."""
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
    """The description of an object, by which it can be recognised but not constructed."""

    description: Any


def _clone_with_value(estimator: E, option: TunedOption, value: Any) -> E:  # noqa: ANN401
    """Return a new estimator with this value of the tuned option, not fitted. Raises StateError if that fails."""
    changed: dict[str, Any] = {}
    if isinstance(value, _Described):
        given = option.value_of(estimator)
        if described(given) != value.description:
            chosen = in_words(value.description)
            raise StateError(
                f"an estimator with the chosen {option.name}, {chosen}, an object that a file cannot contain",
                received=in_words(described(given)),
                remedy=f"construct the estimator with this {option.name}.",
            )
    elif option.name is not None:
        changed = {"likelihood": Gaussian(value)} if option.name == "sigma_noise" else {option.name: value}
    try:
        made: E = clone(estimator, changed)
    except OptionError as error:
        raise StateError(
            f"an estimator with the option that was tuned, {option.name}",
            received=f"a {type(estimator).__name__}: {error.received}",
            remedy="load it into the estimator that was tuned.",
        ) from error
    return made
