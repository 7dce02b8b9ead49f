"""User modules: modules that are neither of the standard library nor installed, and not of these two packages."""

from __future__ import annotations

import importlib.util
import site
import sys
import sysconfig
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

__all__ = [
    "MAIN",
    "OWN",
    "find_module",
    "is_installed_file",
    "is_user_code",
    "origin_of",
    "treat_as_user_code",
    "with_parents",
]

MAIN = ("__main__", "__mp_main__")
"""Module names of a script or notebook, also in a worker process."""
OWN = ("estimators", "bdl_bench")
_INSTALLED = ("site-packages", "dist-packages")
_TREATED: set[str] = set()
"""Installed packages and modules whose code counts as the user's, such as plugins."""


def is_user_code(name: str | None) -> bool:
    """Return whether a module is a user module: anything that is not known to be installed."""
    if not name or name in MAIN:
        return True
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top in OWN:
        return False
    if any(part in _TREATED for part in with_parents(name)):
        return True
    origin = origin_of(name) or origin_of(top)
    return origin is None or not is_installed_file(origin)


def treat_as_user_code(name: str) -> None:
    """Make a module and the rest of its package user code although it is installed: its source counts, not its version.

    Args:
        name: of the module. Its package is the outermost one that is no namespace package.
    """
    if name in MAIN or name.partition(".")[0] in (*OWN, *sys.stdlib_module_names):
        return
    _TREATED.add(next((part for part in with_parents(name) if origin_of(part) is not None), name))


def origin_of(name: str) -> str | None:
    """Return the file of a module, loaded or not; None if it has none."""
    module = sys.modules.get(name)
    if module is not None:
        return getattr(module, "__file__", None)
    spec = find_module(name)
    return spec.origin if spec is not None and spec.has_location else None


def find_module(name: str) -> ModuleSpec | None:
    """Return the spec of a module that is not loaded, without executing its parents."""
    top, *rest = with_parents(name) or [""]
    try:
        spec = importlib.util.find_spec(top) if top else None
        for part in rest:
            if spec is None or spec.submodule_search_locations is None:
                return None
            spec = PathFinder.find_spec(part, spec.submodule_search_locations)
    except (ImportError, ValueError, AttributeError):
        return None
    return spec


def with_parents(name: str) -> list[str]:
    """Return the names of the packages that a module is in, outermost first, and its own."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts)) if all(parts[: i + 1])]


@cache
def is_installed_file(origin: str) -> bool:
    """Return whether a file belongs to the standard library, an installed package or these two packages."""
    paths = Path(origin).absolute(), Path(origin).resolve()
    return any(part in _INSTALLED for path in paths for part in path.parts) or any(
        path.is_relative_to(root) for path in paths for root in _roots()
    )


@cache
def _roots() -> tuple[Path, ...]:
    """Return the folders of other modules: the standard library, installed packages, and these two packages."""
    paths = sysconfig.get_paths()
    found = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [*getattr(site, "getsitepackages", list)(), site.getusersitepackages()]
    own = [Path(origin).parent for origin in map(origin_of, OWN) if origin is not None]
    return (*(Path(path).resolve() for path in found), *own, *(path.resolve() for path in own))
