"""A record of a calibration as plain data: tensors and a JSON text, beside the saved fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from estimators.calibration.calibration import Calibration
from estimators.calibration.grid import CalibrationGrid
from estimators.calibration.record import CalibrationRecord
from estimators.calibration.trials import Trial
from estimators.calibration.tuned_option import TunedOption
from estimators.errors import StateError
from estimators.option_checks import as_number
from estimators.persistence.option_values import described, in_words
from estimators.persistence.state import FittedState

__all__ = ["Described", "belongs_to_record", "decode_record", "encode_record"]

FORMAT = 2


def encode_record(record: CalibrationRecord, key: str) -> FittedState:
    """Return the entries of a state: a JSON text under a key, and tensors whose names start with the key."""
    encoder = _Encoder(key)
    content = {
        "format": FORMAT,
        "option": record.option.name,
        "calibration": encoder.calibration(record.calibration),
        "trials": [encoder.trial(trial) for trial in record.trials],
        "chosen": next(i for i, trial in enumerate(record.trials) if trial is record.chosen),
        "seconds": record.seconds,
        "validation_rows": record.validation_rows,
    }
    return {**encoder.tensors, key: json.dumps(content)}


def belongs_to_record(name: str, key: str) -> bool:
    """Return whether an entry of a state belongs to the record under a key."""
    return name == key or name.startswith(f"{key}/")


class _Encoder:
    """Converts values to JSON types, and collects the tensors among them by name."""

    def __init__(self, key: str) -> None:
        self.key = key
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
        name = f"{self.key}/{len(self.tensors)}"
        self.tensors[name] = tensor
        return name


def decode_record(state: Mapping[str, Tensor | str], key: str) -> tuple[CalibrationRecord, Any]:
    """Return the record under a key of a state, and the chosen value of the option; raise StateError if it is none.

    An object as the chosen value, such as a solver, comes back as a `Described`.
    """
    content = _content(state[key])
    decoder = _Decoder(state)
    trials = tuple(decoder.trial(trial) for trial in content["trials"])
    calibration = decoder.calibration(content["calibration"])
    assert calibration is not None
    record = CalibrationRecord(
        calibration,
        TunedOption(content["option"]),
        trials,
        trials[content["chosen"]],
        content["seconds"],
        content["validation_rows"],
    )
    return record, decoder.value(content["trials"][content["chosen"]]["value"])


def _content(text: Tensor | str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(str(text))
        if content["format"] == FORMAT:
            return content
    except (ValueError, TypeError, KeyError):
        pass
    raise StateError(
        f"a calibration of format {FORMAT}",
        received="another one",
        remedy="calibrate or tune again, or load it with its own version.",
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
        value = in_words(value.description) if isinstance(value, Described) else value
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
        return Described(stored["described"])

    def _tensor(self, name: str) -> Tensor:
        tensor = self.state[name]
        assert isinstance(tensor, Tensor)
        return tensor


@dataclass(frozen=True)
class Described:
    """The description of an object, by which it can be recognised but not constructed."""

    description: Any
