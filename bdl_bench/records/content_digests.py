"""A digest of code and options by value: of a method, a task, a network or a likelihood.

User functions and classes are digested by their code, wherever they are defined: in a module, a script or a notebook.
A lambda is digested with its defaults and the values that it closes over. User modules that such a module imports are
included. Options are digested by value: numbers, tensors, containers, and the attributes of objects.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bdl_bench.records.user_modules import modules_digest
from estimators.persistence.checksums import bits_by_row, digest
from estimators.persistence.option_code import closure_values, code_digest, global_values
from estimators.persistence.user_code import MAIN, is_user_code

__all__ = ["content_digest"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice)
_NO_VALUE = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random, type(threading.Lock()))
"""Objects whose state changes by use, so that it is not an option."""
_PRESETS = "bdl_bench.methods"
"""Presets are digested like user functions, since their options are constants of these modules."""
_OF_EVERY_CLASS = (
    *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__", "__parameters__"),
    *("__abstractmethods__", "_abc_impl", "__orig_bases__", "__static_attributes__", "__firstlineno__"),
)


def content_digest(*things: object, include_values: bool = True, include_code: bool = True) -> str:
    """Return a digest of the code and the options of some objects.

    Args:
        things: functions, classes, objects, networks, plain values.
        include_values: whether to include tensors and the attributes of objects; False for a factory, whose data are
            digested as rows of the problem that it makes.
        include_code: whether to include the code of functions and classes; False to identify objects that may be
            edited. The code of a lambda is always included, since it has no name.

    Returns:
        16 hexadecimal digits; the same in every process.
    """
    walk = _Walk(include_values=include_values, include_code=include_code)
    contents = [walk.of(thing) for thing in things]
    return digest(*contents, modules_digest(walk.modules) if include_code else b"").hex()[:16]


class _Walk:
    """Computes the digest of each value once, and collects in `modules` the user modules of these values."""

    def __init__(self, *, include_values: bool, include_code: bool) -> None:
        self.include_values, self.include_code = include_values, include_code
        self.modules: set[str] = set()
        self._known: dict[int, tuple[object, bytes]] = {}  # the object, too, so that its id is not used again

    def of(self, value: object) -> bytes:
        """Return the digest of a value; a constant for a value that contains itself."""
        if isinstance(value, _PLAIN) and not isinstance(value, Enum):
            return _sha(type(value).__name__, repr(value).encode())
        if id(value) in self._known:
            return self._known[id(value)][1]
        self._known[id(value)] = value, b"itself"
        found = self._of_object(value)
        self._known[id(value)] = value, found
        return found

    def _of_object(self, value: Any) -> bytes:  # noqa: ANN401
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            return _array(value) if self.include_values else b""
        if isinstance(value, Mapping):
            return self._container(value, self._unordered(self.of(k) + self.of(v) for k, v in value.items()))
        if isinstance(value, (list, tuple)):
            return self._container(value, b"".join(map(self.of, value)))
        if isinstance(value, (set, frozenset)):
            return self._container(value, self._unordered(map(self.of, value)))
        if isinstance(value, ModuleType):
            self._note_module(value.__name__)
            return _sha("module", value.__name__.encode())
        if isinstance(value, type):
            return self._class(value)
        code = self._callable(value)
        return self._instance(value) if code is None else code

    def _callable(self, value: Any) -> bytes | None:  # noqa: ANN401
        """Return the digest of a function, also if it is wrapped; None for any other value."""
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return _sha("method", self.of(value.__func__) + self.of(value.__self__))
        if isinstance(value, (staticmethod, classmethod)):
            return _sha(type(value).__name__, self.of(value.__func__))
        if isinstance(value, property):
            return _sha("property", b"".join(map(self.of, (value.fget, value.fset, value.fdel))))
        if isinstance(value, functools.partial):
            return _sha("partial", b"".join(map(self.of, (value.func, value.args, value.keywords))))
        if isinstance(value, functools.cached_property):
            return _sha("cached_property", self.of(value.func))
        if isinstance(value, BuiltinFunctionType):
            return _sha("builtin", f"{value.__module__}.{value.__qualname__}".encode())
        if isinstance(value, CodeType):
            return code_digest(value)
        wrapped = getattr(value, "__wrapped__", None) if callable(value) and not isinstance(value, nn.Module) else None
        return None if wrapped is None else _sha("wrapped", self.of(wrapped))

    def _function(self, function: FunctionType) -> bytes:
        name = function.__qualname__.encode()
        parts = [self.of(function.__defaults__), self.of(function.__kwdefaults__)]
        parts += [self.of(value) for value in closure_values(function).values()]
        module = function.__module__ or MAIN[0]
        if not is_user_code(module) and not module.startswith(_PRESETS):
            return _sha("function", f"{module}{_version(module)}.".encode() + name, *parts)
        if not self.include_code:
            own = code_digest(function.__code__) if "<lambda>" in function.__qualname__ else b""
            return _sha("function", name, own, *parts)
        self._note_module(module)
        parts.append(code_digest(function.__code__))
        for key, value in global_values(function).items():
            parts += [key.encode(), self.of(value)]
        return _sha("function", name, *parts)

    def _class(self, kind: type) -> bytes:
        name = kind.__qualname__ if kind.__module__ in MAIN else f"{kind.__module__}.{kind.__qualname__}"
        if not is_user_code(kind.__module__):
            return _sha("class", name.encode() + _version(kind.__module__).encode())
        if not self.include_code:
            return _sha("class", name.encode())
        self._note_module(kind.__module__)
        members = {key: value for key, value in vars(kind).items() if key not in _OF_EVERY_CLASS}
        fields = members.pop("__dataclass_fields__", {})
        parts = [self.of(base) for base in kind.__bases__]
        parts += [key.encode() + self.of(value) for key, value in sorted(members.items()) if not _is_slot(value)]
        parts += [self.of((f.name, f.default, f.default_factory)) for f in fields.values()]
        return _sha("class", name.encode(), *parts)

    def _instance(self, value: Any) -> bytes:  # noqa: ANN401
        kind = self._class(type(value))
        if isinstance(value, Enum):
            return _sha("enum", kind, value.name.encode())
        if isinstance(value, PurePath):
            return _sha("path", str(value).encode())
        if not self.include_values or isinstance(value, _NO_VALUE):
            seed = value.initial_seed() if isinstance(value, torch.Generator) else ""
            return _sha("object", kind, str(seed).encode())
        if isinstance(value, nn.Module):
            return self._network(value, kind)
        state = _state(value)
        return _sha("object", kind, _text_without_address(value) if state is None else self.of(state))

    def _network(self, module: nn.Module, kind: bytes) -> bytes:
        """Return the digest of all attributes but the mode, which training changes."""
        if isinstance(module, torch.jit.ScriptModule):
            return _sha("script", str(getattr(module, "code", "")).encode(), self.of(dict(module.state_dict())))
        if type(module).__name__ == "OptimizedModule":
            return self.of(module._orig_mod)
        attributes = {key: value for key, value in vars(module).items() if key != "training"}
        if isinstance(module, torch.fx.GraphModule):
            kind, attributes = module.code.encode(), {"_parameters": module._parameters, "_modules": module._modules}
        parts = []
        for key, value in sorted(attributes.items()):
            is_hooks = "hooks" in key and isinstance(value, Mapping)  # the keys are numbers of the process
            parts.append(key.encode() + self.of(list(value.values()) if is_hooks else value))
        return _sha("network", kind, *parts)

    def _container(self, container: object, content: bytes) -> bytes:
        kind = type(container)
        return _sha(f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ not in MAIN else kind.__name__, content)

    def _unordered(self, digests: Iterable[bytes]) -> bytes:
        return b"".join(sorted(digests))

    def _note_module(self, module: str | None) -> None:
        self.modules.add(module or MAIN[0])


def _version(module: str) -> str:
    """Return the version of the package of an installed module; empty if it has none."""
    found = getattr(sys.modules.get(module.partition(".")[0]), "__version__", "")
    return found if isinstance(found, str) else ""


def _state(value: Any) -> object:  # noqa: ANN401
    """Return the state of an object by __getstate__, attributes and slots, or __reduce_ex__; None without these."""
    own: Any = type(value).__getstate__
    if own is not object.__getstate__:
        try:
            return value.__getstate__()
        except Exception:  # any error means that it cannot be copied
            return None
    names = [name for kind in type(value).__mro__ for name in _slots(kind)]
    slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
    if hasattr(value, "__dict__") or slots:
        return {**getattr(value, "__dict__", {}), **slots}
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # any error means that it cannot be copied
        return None
    if not isinstance(reduced, tuple) or len(reduced) < 2:
        return None
    items = [list(part) for part in reduced[3:5] if part is not None]
    return (*reduced[1:3], *items)


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _text_without_address(value: object) -> bytes:
    """Return the text of an object, unless it is its address."""
    text = repr(value)
    return b"" if " at 0x" in text else text.encode()


def _is_slot(value: object) -> bool:
    return type(value).__name__ in ("member_descriptor", "getset_descriptor")


def _array(value: Tensor | np.ndarray[Any, Any] | np.generic) -> bytes:
    if isinstance(value, Tensor):
        head = f"{value.dtype} {tuple(value.shape)}"
        if value.device.type == "meta":
            return _sha("tensor", head.encode())
        dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        plain = dense.resolve_conj().resolve_neg().reshape(1, -1)
        return _sha("tensor", head.encode(), bits_by_row(plain).tobytes())
    array = np.asarray(value)
    content = repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()
    return _sha("array", f"{array.dtype} {array.shape}".encode(), content)


def _sha(kind: str, *parts: bytes) -> bytes:
    return digest(kind, *(len(part).to_bytes(8, "little") + part for part in parts))
