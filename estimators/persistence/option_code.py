"""Functions and classes by what they do: digests of their code, alike in every process of one version of Python."""

from __future__ import annotations

import dis
import json
import types
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

from estimators.persistence.checksums import digest
from estimators.persistence.user_code import OWN, is_user_code

__all__ = [
    "class_code",
    "class_name",
    "closure_values",
    "code_digest",
    "code_of",
    "function_name",
    "global_values",
    "is_library",
    "names_alone",
]

Describe = Callable[[Any], Any]
_DATA = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, type(None))
_MADE_BY_PYTHON = frozenset(
    {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"}
    | {"__annotations__", "__abstractmethods__", "__dataclass_fields__", "__dataclass_params__", "__match_args__"}
    | {"__parameters__", "__orig_bases__", "__hash__", "_abc_impl", "__slots__", "__annotations_cache__"}
)


def class_name(kind: type) -> str:
    """Return the name of a class: alone for classes of these packages or of a user, else with its module."""
    name = kind.__qualname__.rpartition("<locals>.")[2]
    return name if _top(kind.__module__) in OWN or not is_library(kind.__module__) else f"{kind.__module__}.{name}"


def function_name(function: Any) -> str:  # noqa: ANN401
    """Return the module and the name of a function of a library."""
    module, name = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", None)
    name = name or getattr(function, "__name__", None) or type(function).__qualname__
    return name if _top(module) in OWN or not module else f"{module}.{name}"


def names_alone(function: types.FunctionType) -> bool:
    """Return whether a name identifies a function: a library function at the top level of a module or class."""
    module = function.__module__
    return module not in (None, "builtins") and is_library(module) and "<" not in function.__qualname__


def code_of(function: types.FunctionType, describe: Describe) -> str:
    """Return the SHA-256 of a function's code, defaults, and of what it closes over and names.

    Of the globals that it names, numbers, strings and collections count by value, functions and classes by their
    code, and anything else by its class: a program's other objects are no part of a function.
    """
    named = global_values(function)
    parts = [
        code_digest(function.__code__).hex(),
        describe(list(function.__defaults__ or ())),
        describe(function.__kwdefaults__ or {}),
        {name: describe(value) for name, value in closure_values(function).items()},
        {name: _global(value, describe) for name, value in named.items()},
    ]
    return _digest(parts)


def code_digest(code: types.CodeType) -> bytes:
    """Return the SHA-256 of a code object: instructions, constants and names, neither the file nor the lines."""
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags)
    return digest(code.co_code, repr((names, counts)), _constant(code.co_consts), code.co_exceptiontable)


def closure_values(function: types.FunctionType) -> dict[str, Any]:
    """Return the values that a function closes over, by name; None for one that is not assigned yet."""
    found = {}
    for name, variable in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = variable.cell_contents
        except ValueError:  # not assigned yet
            found[name] = None
    return found


def global_values(function: types.FunctionType) -> dict[str, Any]:
    """Return the global variables that a function reads, also in nested functions, as far as they exist."""
    names: set[str] = set()
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        names |= {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}


def _constant(constant: object) -> bytes:
    if isinstance(constant, types.CodeType):
        return code_digest(constant)
    if isinstance(constant, frozenset):  # its order differs between processes
        return digest("frozenset", *sorted(map(_constant, constant)))
    if isinstance(constant, tuple):
        return digest("tuple", *map(_constant, constant))
    return digest(f"{type(constant).__name__} {constant!r}")


def class_code(kind: type, describe: Describe) -> str:
    """Return the SHA-256 of the code of a class and of its bases, up to those of a library."""
    parts: list[Any] = []
    for base in kind.__mro__:
        if is_library(base.__module__):
            parts.append(class_name(base))
            continue
        members = {name: _member(item) for name, item in vars(base).items() if name not in _MADE_BY_PYTHON}
        described = {name: [_global(part, describe) for part in several] for name, several in sorted(members.items())}
        parts.append([class_name(base), described])
    return _digest(parts)


@cache
def is_library(module: str | None) -> bool:
    """Return whether a module belongs to Python, these packages or an installed package, and not to the user."""
    return not is_user_code(module or "builtins")


def _member(item: object) -> list[object]:
    """The functions of a member of a class, or its value."""
    if isinstance(item, (staticmethod, classmethod)):
        return [item.__func__]
    if isinstance(item, property):
        return [part for part in (item.fget, item.fset) if part is not None]
    if isinstance(item, cached_property):
        return [item.func]
    return [item]


def _global(value: object, describe: Describe) -> Any:  # noqa: ANN401
    is_array = _top(type(value).__module__) in ("numpy", "torch") and hasattr(value, "shape")
    known = is_array or isinstance(value, (*_DATA, types.FunctionType, types.ModuleType, type))
    return describe(value) if known else {"object": class_name(type(value))}


def _digest(parts: Any) -> str:  # noqa: ANN401
    return digest(json.dumps(parts, sort_keys=True)).hex()


def _top(module: str) -> str:
    return module.partition(".")[0]
