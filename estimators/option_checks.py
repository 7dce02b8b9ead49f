"""Checks of the arguments of constructors: a wrong type or value is an OptionError at once, never a raw error later.

A number may come as an int, a float, a numpy scalar, or a tensor or array of one element. True and False are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from estimators.errors import OptionError

__all__ = [
    "PriorOption",
    "as_number",
    "checked_choice",
    "checked_flag",
    "checked_instance",
    "checked_integer",
    "checked_number",
    "checked_precision",
    "checked_prior_mean",
    "checked_seed",
    "shortened",
    "shown",
]

T = TypeVar("T")
PriorOption: TypeAlias = float | Tensor | Mapping[str, float | Tensor]
"""A number for all weights, a tensor with one element or one for each weight (P,), or a mapping from globs over
parameter names to numbers, tensors with one element, and tensors of the shape of the parameter."""
_LONGEST = 200  # characters of a value in a message
_SEEDS = (-(2**63), 2**64 - 1)  # what torch.Generator.manual_seed takes


def as_number(value: object) -> int | float | None:
    """Return a number as a Python int or float; None for what is none, True and False among them."""
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (int, float)):
        return value if type(value) in (int, float) else (int(value) if isinstance(value, int) else float(value))
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _only_element(value)
    return None


def checked_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    words: Sequence[str | None] = (),
    remedy: str | None = None,
) -> float | Any:  # noqa: ANN401
    """Return a finite number as a float, or one of `words` as it is.

    Args:
        name: the option, for the message.
        value: what was passed.
        above: exclusive lower bound, or None.
        at_least: inclusive lower bound, or None.
        below: exclusive upper bound, or None.
        at_most: inclusive upper bound, or None.
        words: strings, or None, that stand for a number that is chosen later.
        remedy: what to try instead.

    Raises:
        OptionError: for anything else.
    """
    if _is_word(value, words):
        return value
    number = as_number(value)
    bounds = {">": above, ">=": at_least, "<": below, "<=": at_most}
    if number is not None and math.isfinite(number) and all(_holds(number, sign, to) for sign, to in bounds.items()):
        return float(number)
    lower = f"{above:g} < " if above is not None else f"{at_least:g} <= " if at_least is not None else ""
    upper = f" < {below:g}" if below is not None else f" <= {at_most:g}" if at_most is not None else ""
    if lower and not upper:
        lower, upper = "", f" > {above:g}" if above is not None else f" >= {at_least:g}"
    kind = "a number" if lower or upper else "a finite number"
    expected = _or_words(f"{lower}{name}{upper}, {kind}", words)
    raise OptionError(expected, received=shown(value), remedy=remedy or "a number in that range.")


def checked_integer(
    name: str,
    value: object,
    *,
    at_least: int | None = None,
    words: Sequence[str | None] = (),
    remedy: str | None = None,
) -> int | Any:  # noqa: ANN401
    """Return a whole number as an int, or one of `words` as it is. Raises OptionError for anything else."""
    if _is_word(value, words):
        return value
    number = as_number(value)
    if isinstance(number, int) and (at_least is None or number >= at_least):
        return number
    expected = f"{name}, a whole number" if at_least is None else f"{name} >= {at_least}, a whole number"
    raise OptionError(_or_words(expected, words), received=shown(value), remedy=remedy or "a whole number.")


def checked_seed(value: object) -> int:
    """Return a seed of torch's generators, a whole number of 64 bits. Raises OptionError for anything else."""
    number = as_number(value)
    if isinstance(number, int) and _SEEDS[0] <= number <= _SEEDS[1]:
        return number
    raise OptionError("seed, a whole number of at most 64 bits", received=shown(value), remedy="seed=0.")


def checked_precision(value: object) -> PriorOption:
    """Return δ: a positive number, a tensor (P,), or a mapping of globs to numbers or tensors, none of them negative.

    Tensors are copied. Their lengths and shapes are checked in `fit`, which knows the parameters.

    Raises:
        OptionError: for anything else: True, NaN, a string, a negative entry.
    """
    number = as_number(value)
    if number is not None and number > 0 and _is_precision(number):
        return float(number)
    found = None if number is not None else _prior_option(value)
    if found is not None and all(_not_negative(part) for part in _parts(found)):
        return found
    raise OptionError(
        "prior_precision > 0: a number, a tensor (P,) with one for each weight, or a mapping {glob of parameter names: "
        "number >= 0 or tensor of the parameter's shape}",
        received=shown(value),
        remedy="δ of the sum convention; from weight decay wd on a mean cross-entropy over N rows it is N·wd.",
    )


def checked_prior_mean(value: object) -> PriorOption:
    """Return θ₀: a number, a tensor (P,), or a mapping of globs to numbers or tensors, such as a state dict.

    Tensors are copied. Their lengths and shapes are checked in `fit`, which knows the parameters.

    Raises:
        OptionError: for anything else: True, NaN, a string.
    """
    number = as_number(value)
    if number is not None and math.isfinite(number):
        return float(number)
    found = None if number is not None else _prior_option(value)
    if found is not None:
        return found
    raise OptionError(
        "prior_mean, a finite number, a tensor (P,) with one for each weight, or a mapping {glob of parameter names: "
        "number or tensor of the parameter's shape}, such as a state dict",
        received=shown(value),
        remedy="0, or the mean of all weights.",
    )


def _prior_option(value: object) -> PriorOption | None:
    """Return a tensor, or a mapping of strings to numbers and tensors, with copies of finite tensors; None for else."""
    if not isinstance(value, Mapping):
        return _finite_tensor(value)
    parts = {glob: _number_or_tensor(part) for glob, part in value.items()}
    if not parts or not all(isinstance(glob, str) for glob in parts):
        return None
    known = {glob: part for glob, part in parts.items() if part is not None}
    return known if len(known) == len(parts) else None


def _number_or_tensor(value: object) -> float | Tensor | None:
    number = as_number(value)
    if number is not None:
        return float(number) if math.isfinite(number) else None
    return _finite_tensor(value)


def _finite_tensor(value: object) -> Tensor | None:
    """Return a copy of a tensor or array of finite numbers; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind not in "fiuc":
        return None
    if not isinstance(value, (Tensor, np.ndarray)):
        return None
    tensor = torch.as_tensor(value).detach()
    if tensor.dtype == torch.bool or tensor.layout != torch.strided or not bool(torch.isfinite(tensor).all()):
        return None
    return tensor.clone()


def _parts(option: PriorOption) -> list[float | Tensor]:
    """Return the numbers and tensors of an option."""
    return list(option.values()) if isinstance(option, Mapping) else [option]


def _not_negative(part: float | Tensor) -> bool:
    if isinstance(part, Tensor):
        return not part.is_complex() and bool((part >= 0).all())
    return part >= 0


def checked_choice(name: str, value: T, allowed: Sequence[object], *, remedy: str | None = None) -> T:
    """Return one of the allowed strings (or None). Raises OptionError for anything else, of whatever type."""
    if _is_word(value, allowed):
        return value
    listed = " or ".join(repr(word) for word in allowed)
    raise OptionError(f"{name} {listed}", received=shown(value), remedy=remedy or f"{name}={allowed[0]!r}.")


def checked_flag(name: str, value: object) -> bool:
    """Return True or False. Raises OptionError for anything else."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise OptionError(f"{name} True or False", received=shown(value), remedy=f"{name}=True.")


def checked_instance(name: str, value: T, kind: type, *, remedy: str) -> T:
    """Return an object of that class. Raises OptionError for anything else, the class itself among it."""
    if isinstance(value, kind):
        return value
    raise OptionError(f"{name}, an object of class {kind.__name__}", received=shown(value), remedy=remedy)


def shown(value: object, longest: int = _LONGEST) -> str:
    """Return `repr(value)`, shortened to a number of characters, as error messages have it."""
    return shortened(repr(value), longest)


def shortened(text: str, length: int) -> str:
    """Return a text, or its first characters and an ellipsis."""
    return text if len(text) <= length else f"{text[:length]}..."


def _is_precision(number: float | None) -> bool:
    return number is not None and math.isfinite(number) and number >= 0


def _only_element(value: Tensor | np.ndarray[Any, Any] | np.generic) -> int | float | None:
    n_elements = value.numel() if isinstance(value, Tensor) else value.size
    if n_elements != 1:
        return None
    element = value.detach().cpu().reshape(()).item() if isinstance(value, Tensor) else value.reshape(()).item()
    return element if isinstance(element, (int, float)) and not isinstance(element, bool) else None


def _is_word(value: object, words: Sequence[object]) -> bool:
    return (value is None or isinstance(value, str)) and value in words


def _holds(number: float, sign: str, bound: float | None) -> bool:
    if bound is None:
        return True
    return {">": number > bound, ">=": number >= bound, "<": number < bound, "<=": number <= bound}[sign]


def _or_words(expected: str, words: Sequence[str | None]) -> str:
    return " or ".join([expected, *map(repr, words)])
