"""Restore the state that a forward pass may change: buffers, attributes, and containers that hooks use.

A forward may count calls in a buffer, keep an activation as an attribute, or store features in a dict of a hook's
closure. Calls of this library must not change these: a value from inside a functional transform is invalid outside it.
"""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["preserved_state", "preserved_tensors"]

_DEPTH = 4
"""How many references deep containers are searched: a container in a dict of an object in a closure."""
_MOST = 10_000
"""Largest container that counts as state; larger ones are data, and too slow to copy per call."""
_MISSING = object()
_CONTAINERS = frozenset({dict, list, tuple, OrderedDict})
"""Types of containers that are searched for tensors."""
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore buffers, attributes and reachable containers of `model` afterwards, also after an exception."""
    kept_containers = [(c, dict(c) if isinstance(c, dict) else list(c)) for c in _containers(model)]
    kept_globals = [(container, dict(container)) for container in _global_dicts(model)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with preserved_tensors(model):
            yield
    finally:
        for container, before in kept_containers:
            _put_back(container, before)
        for container, before in kept_globals:
            _put_tensors_back(container, before)
        for module, training in modes:
            module.training = training


@contextmanager
def preserved_tensors(model: nn.Module) -> Iterator[None]:
    """Restore the values of buffers and of tensors among the attributes of `model` afterwards."""
    kept = [(tensor, tensor._version, tensor.detach().clone()) for tensor in _state_tensors(model)]
    entries = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
    try:
        yield
    finally:
        for buffers, before in entries:
            _put_back(buffers, before)
        with torch.no_grad():
            for tensor, version, value in kept:
                if tensor._version != version:
                    tensor.copy_(value)


def _state_tensors(model: nn.Module) -> list[Tensor]:
    """Buffers, and tensors among the attributes, each once."""
    found: dict[int, Tensor] = {}
    buffers = [buffer for module in model.modules() for buffer in module._buffers.values()]
    attributes = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) or (type(value) in _CONTAINERS and not name.startswith("_"))
    ]
    for value in [*buffers, *attributes, *_in_containers(attributes, _DEPTH)]:
        if isinstance(value, Tensor) and _is_state(value):
            found[id(value)] = value
    return list(found.values())


def _in_containers(values: Iterable[Any], depth: int) -> Iterator[Any]:
    """The contents of lists and dicts among `values`, and of those inside them, down to `depth`."""
    for value in values:
        if depth > 0 and type(value) in _CONTAINERS and len(value) <= _MOST:
            inner = list(value.values()) if isinstance(value, dict) else list(value)
            yield from inner
            yield from _in_containers(inner, depth - 1)


def _is_state(tensor: Tensor) -> bool:
    """Whether a tensor can be restored: no parameter, and not from inside a functional transform."""
    plain = not isinstance(tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_inference()
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _containers(model: nn.Module) -> list[Any]:
    """Dicts, lists, sets and deques that a forward can change: of modules, of hooks, and in closures of hooks."""
    found: dict[int, Any] = {}
    for module in model.modules():
        _collect(vars(module), found, 1)
        _collect(module._buffers, found, 1)
        for name in _HOOKS:
            for hook in getattr(module, name).values():
                _collect(hook, found, _DEPTH)
        for name, value in vars(module).items():
            if not name.startswith("_") or callable(value):
                _collect(value, found, _DEPTH)
    return list(found.values())


def _collect(value: Any, found: dict[int, Any], depth: int) -> None:  # noqa: ANN401
    """Add the containers that are reachable from `value` within `depth` references; tensors and modules are skipped."""
    if depth == 0 or id(value) in found or isinstance(value, (Tensor, nn.Module, type, types.ModuleType)):
        return
    if isinstance(value, (dict, list, set, deque)):
        if len(value) <= _MOST:
            found[id(value)] = value
            inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
            if depth > 1:
                for part in list(inner):
                    _collect(part, found, depth - 1)
        return
    for part in _inside(value):
        _collect(part, found, depth - 1)


def _inside(value: Any) -> list[Any]:  # noqa: ANN401
    """The objects that a function, a method, a partial or an object refers to."""
    if isinstance(value, types.FunctionType):
        return [*_closure_contents(value), *(value.__defaults__ or ())]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    content = getattr(value, "__dict__", None)
    return [content] if isinstance(content, dict) and not isinstance(value, (torch.dtype, torch.device)) else []


def _global_dicts(model: nn.Module) -> list[dict[Any, Any]]:
    """Dicts among the globals that the code of forwards and hooks refers to."""
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    functions = [type(module).forward for module in plain]
    functions += [hook for module in plain for name in _HOOKS for hook in getattr(module, name).values()]
    found: dict[int, dict[Any, Any]] = {}
    for function in functions:
        if isinstance(function, types.FunctionType) and not (function.__module__ or "").startswith("torch."):
            named = (function.__globals__.get(name) for name in function.__code__.co_names)
            found |= {id(value): value for value in named if type(value) is dict and len(value) <= _MOST}
    return list(found.values())


def _closure_contents(function: types.FunctionType) -> list[Any]:
    """The objects that a function refers to in its closure."""
    contents = []
    for variable in function.__closure__ or ():
        with suppress(ValueError):  # not assigned yet
            contents.append(variable.cell_contents)
    return contents


def _put_back(container: Any, before: Any) -> None:  # noqa: ANN401
    """Restore a container entry by entry: other threads may read it."""
    if isinstance(container, dict):
        for key in [key for key in container if key not in before]:
            del container[key]
        for key, value in before.items():
            if container.get(key, _MISSING) is not value:
                container[key] = value
    elif len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
        container.clear()
        container.update(before) if isinstance(container, set) else container.extend(before)


def _put_tensors_back(container: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Restore the tensors in a dict of a module's globals; other code may have made the other changes."""
    for key in [key for key, value in container.items() if isinstance(value, Tensor)]:
        if key not in before:
            del container[key]
        elif container[key] is not before[key]:
            container[key] = before[key]
