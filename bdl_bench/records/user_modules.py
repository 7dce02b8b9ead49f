"""User modules: those that are not installed. What they import, and a digest of their sources.

A number in a record depends on every module that a method, an estimator, a task or a problem imports. Modules of the
standard library, of installed packages and of these two packages are digested by their version instead (`versions`).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from weakref import WeakKeyDictionary

from estimators.persistence.checksums import digest
from estimators.persistence.option_code import code_digest
from estimators.persistence.user_code import MAIN, find_module, is_user_code, origin_of, with_parents

__all__ = ["modules_digest"]

_SEEN: WeakKeyDictionary[ModuleType, tuple[object, bytes]] = WeakKeyDictionary()


def modules_digest(names: Iterable[str]) -> str:
    """Return a digest of the sources of the user modules among these, and of all user modules that they import."""
    found: dict[str, bytes] = {}
    waiting = [name for name in names if name not in MAIN]
    while waiting:
        name = waiting.pop()
        for part in with_parents(name):
            if part not in found and part not in MAIN and (path := _file_of(part)) is not None:
                found[part] = _content(part, path)
                waiting += _imported(part, found[part])
    parts = [f"{name}\0".encode() + digest(content) + _loaded_code(name) for name, content in sorted(found.items())]
    return digest(*parts).hex()


def _content(name: str, path: Path) -> bytes:
    """Return the source of a module at its first use; an edit changes it once the module is loaded again."""
    module = sys.modules.get(name)
    if module is None:
        return path.read_bytes()
    spec = getattr(module, "__spec__", None)  # another object after a reload
    seen = _SEEN.get(module)
    if seen is None or seen[0] is not spec:
        _SEEN[module] = seen = spec, path.read_bytes()
    return seen[1]


def _loaded_code(name: str) -> bytes:
    """Return a digest of the functions of a loaded module, whose file may have been edited since the import."""
    parts: list[bytes] = []
    for key, value in sorted(vars(sys.modules[name]).items()) if name in sys.modules else ():
        members = vars(value).items() if isinstance(value, type) else [("", value)]
        for member, function in members:
            if isinstance(function, FunctionType) and value.__module__ == name:
                parts.append(f"{key}.{member}".encode() + code_digest(function.__code__))
    return digest(*parts)


def _imported(name: str, content: bytes) -> Iterator[str]:
    """Yield names that may be modules: those in import statements, and the modules of what the namespace holds."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # a compiled extension, or a file that was edited into one that does not parse
        return
    package = name if _is_package(name) else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module or "", node.level, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.Call) and _is_import_call(node):
            first = node.args[0]
            assert isinstance(first, ast.Constant)
            yield str(first.value)
    for value in list(vars(sys.modules[name]).values()) if name in sys.modules else ():
        found = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(found, str):
            yield found


def _is_import_call(node: ast.Call) -> bool:
    """Return whether a call is import_module("name") or __import__("name")."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    is_import = called in ("import_module", "__import__") and bool(node.args)
    return is_import and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)


def _absolute(module: str, level: int, package: str) -> str:
    if level == 0:
        return module
    parents = package.split(".")
    base = ".".join(parents[: len(parents) - level + 1])
    return ".".join(part for part in (base, module) if part)


def _file_of(name: str) -> Path | None:
    """Return the file of a user module; None for other modules, or if it has no file."""
    origin = origin_of(name)
    if origin is None:
        return None
    return Path(origin) if Path(origin).is_file() and is_user_code(name) else None


def _is_package(name: str) -> bool:
    if name in sys.modules:
        return hasattr(sys.modules[name], "__path__")
    spec = find_module(name)
    return spec is not None and spec.submodule_search_locations is not None
