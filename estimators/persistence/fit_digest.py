"""A digest of a saved fit, equal for two fits that predict the same, whatever they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from estimators.persistence.checksums import digest
from estimators.persistence.state import ABOUT, CALIBRATION, TUNING

__all__ = ["fit_digest"]

_COSTS = frozenset({"passes", "fit_passes", "seconds", "derivatives", "report"})
"""Entries of a description that say how a fit was made, at any depth."""
_IDENTITY = ("estimator", "options", "n_data", "checksum", "learned")


def fit_digest(state: Mapping[str, Tensor | str]) -> str:
    """Return the SHA-256 of the tensors of a state, of its options and learned values, and of its calibration.

    Args:
        state: the result of `state_dict` of an estimator or a tuned one.

    Returns:
        64 hexadecimal digits.
    """
    tensors = {key: value for key, value in sorted(state.items()) if isinstance(value, Tensor)}
    parts = [part for key, value in tensors.items() for part in (f"{key}{tuple(value.shape)}{value.dtype}", value)]
    records = {key: _record(_content(state.get(key)), key) for key in (CALIBRATION, TUNING)}
    about = _content(state.get(ABOUT))
    described = {name: _without_costs(about.get(name)) for name in _IDENTITY}
    return digest(json.dumps([described, records], sort_keys=True), *parts).hex()


def _content(text: Tensor | str | None) -> dict[str, Any]:
    """Return a text of a state as a dict, empty if it is none."""
    try:
        content = json.loads(text) if isinstance(text, str) else {}
    except json.JSONDecodeError:
        content = {}
    return content if isinstance(content, dict) else {}


def _record(content: dict[str, Any], key: str) -> list[Any]:
    """Return the chosen calibration and, if `fit` chose it, the prior precision: `tune` puts it into the options."""
    if not content:
        return []
    value = content["trials"][content["chosen"]]["value"] if key == CALIBRATION else None
    return [_without_costs(content["calibration"]), content["option"], value]


def _without_costs(value: Any) -> Any:  # noqa: ANN401
    """Return a value of JSON types without the entries in _COSTS; texts that are JSON are read."""
    if isinstance(value, dict):
        return {name: _without_costs(item) for name, item in value.items() if name not in _COSTS}
    if isinstance(value, list):
        return [_without_costs(item) for item in value]
    return _without_costs(_content(value)) if isinstance(value, str) and value.startswith("{") else value
