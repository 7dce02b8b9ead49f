"""Options by value: what tells whether two estimators were constructed alike, in one process or in two.

`described(option)` is made of JSON types only, and equal for equal options:

    numbers      1 is 1.0, np.float32(1), torch.tensor(1.0); whole numbers exactly, others to the 24 bits of float32
    several      a list, a tuple, an array or a tensor of any dtype: their values; long ones as shape and SHA-256
    mappings     their items in order: in a prior precision the first match counts
    functions    their name and a digest of their code, of the values it closes over and of the globals it names
    objects      their class and the attributes that pickle would keep; of custom classes their code as well

Nothing in it is a memory address. An attribute whose name ends in "_" is learned, not an option; attributes listed in
`not_compared` of a class change how a fit is computed, and not what it is.
"""

from __future__ import annotations

import functools
import json
import math
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from estimators.option_checks import as_number, shortened
from estimators.persistence.checksums import digest
from estimators.persistence.option_code import class_code, class_name, code_of, function_name, is_library, names_alone
from estimators.runtime.module_wrappers import named_tensors, unwrapped

__all__ = ["described", "differences", "in_words"]

_SHORT = 16  # numbers that are listed; of more, shape and digest
_SHOWN = 120  # characters of a value in a message
_DEEPEST, _MOST_PARTS = 50, 100_000  # beyond these, an object is described by its class alone


def described(value: Any) -> Any:  # noqa: ANN401
    """Return the value of an option in JSON types, equal for options that are equal."""
    return _Description().of(value)


def differences(there: Any, here: Any, name: str) -> list[tuple[str, str, str]]:  # noqa: ANN401
    """Return (dotted name, value there, value here) of every part in which two descriptions differ."""
    if there == here:
        return []
    if isinstance(there, dict) and isinstance(here, dict) and _same_class(there, here):
        inner_there, inner_here = there.get("options", {}), here.get("options", {})
        names = dict.fromkeys([*inner_there, *inner_here])
        parts = [differences(inner_there.get(n, _ABSENT), inner_here.get(n, _ABSENT), f"{name}.{n}") for n in names]
        if found := [difference for part in parts for difference in part]:
            return found
    shown = in_words(there), in_words(here)
    if shown[0] == shown[1]:  # they differ behind what is shown
        shown = _with_digest(shown[0], there), _with_digest(shown[1], here)
    return [(name, *shown)]


def in_words(description: Any) -> str:  # noqa: ANN401
    """Return a description as messages show it."""
    return shortened(_text(description), _SHOWN)


def _with_digest(text: str, description: Any) -> str:  # noqa: ANN401
    return f"{text} <{digest(json.dumps(description, sort_keys=True)).hex()[:8]}>"


_ABSENT = {"absent": True}
_BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    np.ufunc,
)


def _same_class(there: dict[str, Any], here: dict[str, Any]) -> bool:
    return "object" in there and there["object"] == here.get("object") and there.get("code") == here.get("code")


def _text(description: Any) -> str:  # noqa: ANN401
    if isinstance(description, list):
        return f"[{', '.join(map(_text, description))}]"
    if not isinstance(description, dict):
        return str(np.float32(description)) if isinstance(description, float) else repr(description)
    if "flag" in description:
        return str(description["flag"])
    if "object" in description:
        options = ", ".join(f"{name}={_text(value)}" for name, value in description.get("options", {}).items())
        suffix = f" <code {description['code'][:8]}>" if "code" in description else ""
        return f"{description['object']}({options}){suffix}"
    if "mapping" in description:
        return f"{{{', '.join(f'{_text(key)}: {_text(value)}' for key, value in description['mapping'])}}}"
    if "shape" in description:
        first = ", ".join(map(_text, description["first"]))
        return f"numbers of shape {tuple(description['shape'])}: {first}, ... <{description['sha256'][:8]}>"
    if "function" in description:
        code = description.get("code")
        return f"{description['function']} <code {code[:8]}>" if isinstance(code, str) else description["function"]
    return " ".join(f"{key} {value if isinstance(value, str) else _text(value)}" for key, value in description.items())


class _Description:
    """One walk over a value; what it is within at the moment, and the functions and classes it has seen."""

    def __init__(self) -> None:
        self._within: list[int] = []
        self._parts = 0
        self._code: dict[int, str] = {}

    def of(self, value: Any) -> Any:  # noqa: ANN401
        """The description of a value."""
        if value is None or isinstance(value, str):
            return str(value) if isinstance(value, str) else None
        if isinstance(value, (bool, np.bool_)):
            return {"flag": bool(value)}  # True is not 1
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": digest(bytes(value)).hex()}
        if (number := as_number(value)) is not None and getattr(value, "ndim", 0) == 0:
            return _number(number)
        self._parts += 1
        if len(self._within) > _DEEPEST or self._parts > _MOST_PARTS:  # a function may close over a whole program
            return {"object": class_name(type(value))}
        if id(value) in self._within:
            return {"cycle": len(self._within) - self._within.index(id(value))}
        self._within.append(id(value))
        try:
            return self._of_several(value)
        finally:
            self._within.pop()

    def _of_several(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, (Tensor, np.ndarray)):
            return self._array(value)
        if isinstance(value, Mapping):
            return {"mapping": [[self.of(key), self.of(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple, range, deque)) and not hasattr(value, "_fields"):
            return self._sequence(list(value))
        if isinstance(value, (set, frozenset)):
            return {"set": sorted((self.of(item) for item in value), key=json.dumps)}
        return self._named(value)

    def _named(self, value: Any) -> Any:  # noqa: ANN401
        """What has a name of its own, or is an object."""
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, Enum):
            return {"object": class_name(type(value)), "options": {"name": value.name}}
        if isinstance(value, (torch.dtype, torch.device, PurePath)):
            return {type(value).__name__: str(value)}
        if isinstance(value, types.ModuleType):
            return {"module": value.__name__}
        if isinstance(value, nn.Module):
            return self._module(unwrapped(value))
        return self._function(value) if callable(value) else self._object(value)

    def _sequence(self, values: Sequence[Any]) -> Any:  # noqa: ANN401
        """A list of descriptions; numbers alone as the array that they make."""
        if (array := _as_array(values)) is not None:
            return self._array(array)
        return [self.of(item) for item in values]

    def _array(self, value: Tensor | np.ndarray[Any, Any]) -> Any:  # noqa: ANN401
        array = _numpy(value)
        if array.dtype == object:
            return [self.of(item) for item in array.tolist()]
        if array.dtype.kind not in "biufc":
            return {"shape": list(array.shape), "first": [], "sha256": digest(repr(array.tolist())).hex()}
        if array.dtype.kind == "b" and array.size <= _SHORT:
            return self.of(array.tolist())
        if array.dtype.kind == "c":
            array = np.stack([array.real, array.imag], axis=-1)
        rounded = _rounded(array) if array.dtype.kind == "f" else array
        if array.size <= _SHORT:
            return _nested(rounded)
        first = [_number(number) for number in rounded.reshape(-1)[:3].tolist()]
        return {"shape": list(array.shape), "first": first, "sha256": digest(_bytes(rounded)).hex()}

    def _module(self, module: nn.Module) -> dict[str, Any]:
        """Return the class of a module, its tensors, and further attributes of its layers."""
        parts: list[Any] = [[name, self.of(tensor)] for name, tensor in named_tensors(module).items()]
        plain = vars(nn.Module()).keys()
        for name, layer in module.named_modules():
            beside = {key: self.of(value) for key, value in vars(layer).items() if key not in plain}
            parts.append([name, self._class(type(layer)), beside])
        return {**self._class(type(module)), "options": {"content": digest(json.dumps(parts)).hex()}}

    def _class(self, kind: type) -> dict[str, Any]:
        named: dict[str, Any] = {"object": class_name(kind)}
        if is_library(kind.__module__):
            return named
        return {**named, "code": self._memo(kind, lambda: class_code(kind, self.of))}

    def _function(self, value: Any) -> dict[str, Any]:  # noqa: ANN401
        """What can be called."""
        value = getattr(value, "_torchdynamo_orig_callable", value)  # of torch.compile
        if isinstance(value, functools.partial):
            parts = {"func": value.func, "args": value.args, "keywords": value.keywords}
            return {"object": "partial", "options": {name: self.of(part) for name, part in parts.items()}}
        if isinstance(value, types.MethodType):
            return {"function": value.__name__, "code": self.of(value.__func__), "of": self.of(value.__self__)}
        if isinstance(value, torch.jit.ScriptFunction):
            return {"function": value.name, "code": digest(str(value.code)).hex()}
        if isinstance(value, types.FunctionType):
            if names_alone(value):
                return {"function": function_name(value)}
            return {"function": value.__name__, "code": self._memo(value, lambda: code_of(value, self.of))}
        if not isinstance(value, _BUILT_IN):
            return self._object(value)
        owner = getattr(value, "__self__", None)
        bound = owner is not None and not isinstance(owner, (types.ModuleType, type))
        return {"function": function_name(value), **({"of": self.of(owner)} if bound else {})}

    def _object(self, value: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return the class and the attributes of an object."""
        options = {name: self.of(item) for name, item in _attributes(value).items()}
        return {**self._class(type(value)), "options": options}

    def _memo(self, value: Any, digest: Callable[[], str]) -> str:  # noqa: ANN401
        if id(value) not in self._code:
            self._code[id(value)] = digest()
        return self._code[id(value)]


def _attributes(value: Any) -> dict[str, Any]:  # noqa: ANN401
    """What pickle would keep of an object by name, without what is learned, cached or not compared."""
    found: dict[str, Any] = {}
    for part in _state(value):
        if isinstance(part, Mapping):
            found |= {str(name): item for name, item in part.items()}
        elif part is not None:
            found[f"part {len(found)}"] = part
    skipped = getattr(type(value), "not_compared", ())
    cached = {
        name
        for kind in type(value).__mro__
        for name, item in vars(kind).items()
        if isinstance(item, functools.cached_property)
    }
    return {
        name: item
        for name, item in sorted(found.items())
        if name not in skipped and name not in cached and (not name.endswith("_") or name.startswith("__"))
    }


def _state(value: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """What `__getstate__` or, for objects without attributes, `__reduce_ex__` gives; nothing for what has neither."""
    try:
        state = value.__getstate__()
        if state is not None:
            return state if isinstance(state, tuple) else (state,)
        reduced = value.__reduce_ex__(2)
    except Exception:
        return ()
    if isinstance(reduced, str):
        return (reduced,)
    return tuple(part for part in [*reduced[1], *reduced[2:3]] if part is not type(value))


def _number(number: float) -> Any:  # noqa: ANN401
    """A number as JSON has it: a whole one as an int, however it came."""
    if isinstance(number, int):
        return number
    if not math.isfinite(number):
        return {"number": repr(number)}
    rounded = float(_rounded(np.float64(number)))
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


def _rounded(values: Any) -> Any:  # noqa: ANN401
    """Real numbers to 24 bits, as float32 has them, without its range: 0.1 and np.float32(0.1) are one option."""
    mantissa, exponent = np.frexp(np.asarray(values, dtype=np.float64))
    whole = np.asarray(values, dtype=np.float64) == np.round(values)  # whole numbers, however large, are exact
    return np.where(whole, values, np.ldexp(np.round(mantissa * 2**24) / 2**24, exponent))


def _as_array(values: Sequence[Any]) -> np.ndarray[Any, Any] | None:
    """Numbers in a sequence, or in sequences of one length; None for anything else."""
    if not len(values):
        return None
    if isinstance(values[0], (list, tuple)):
        rows = [_as_array(row) if isinstance(row, (list, tuple)) else None for row in values]
        alike = all(row is not None and rows[0] is not None and row.shape == rows[0].shape for row in rows)
        return np.stack([row for row in rows if row is not None]) if alike else None
    if len(values) > _SHORT and all(isinstance(value, (bool, np.bool_)) for value in values):
        return np.array(values, dtype=bool)
    numbers = [as_number(value) for value in values]
    if any(number is None or getattr(value, "ndim", 0) for number, value in zip(numbers, values, strict=True)):
        return None
    return np.array(numbers) if all(abs(number or 0) < 2**63 for number in numbers) else None


def _numpy(value: Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if not isinstance(value, Tensor):
        return value
    tensor = value.detach().cpu()
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    if tensor.is_floating_point():
        tensor = tensor.double()
    found: np.ndarray[Any, Any] = tensor.resolve_conj().resolve_neg().numpy()
    return found


def _nested(array: np.ndarray[Any, Any]) -> Any:  # noqa: ANN401
    return [_nested(row) for row in array] if array.ndim else _number(array.item())


def _bytes(array: np.ndarray[Any, Any]) -> bytes:
    """Values without their dtype: 1 is 1.0, and there is one zero."""
    if array.dtype.kind in "iu" and array.size and int(np.abs(array).max()) > 2**53:
        return np.ascontiguousarray(array).astype("<i8" if array.dtype.kind == "i" else "<u8").tobytes()
    return np.ascontiguousarray(array.astype("<f8") + 0.0).tobytes()
