"""Loading of plugins: by reference, from installed packages, and in the processes that run jobs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from bdl_bench.plugins.registry import PluginError, PluginRegistry
from estimators.persistence.user_code import treat_as_user_code

__all__ = [
    "GROUP",
    "load_installed_plugins",
    "load_plugins",
    "loaded_plugins",
    "require_plugins",
    "unload_plugin",
]

GROUP = "bdl_bench.plugins"
"""The entry-point group of installed plugins."""
AUTOLOAD = "BDL_BENCH_PLUGIN_AUTOLOAD"
"""The environment variable that turns off the loading of installed plugins if it is 0."""
_REGISTER = "register"

Register: TypeAlias = Callable[[PluginRegistry], object]
Plugin: TypeAlias = str | ModuleType | Register

_LOADED: dict[str, tuple[Register, PluginRegistry]] = {}


def load_plugins(plugins: Iterable[Plugin]) -> list[str]:
    """Load plugins, each once.

    A plugin whose register function is a new object, such as one that is defined again in a notebook, replaces what it
    had added. An edited module needs a new process or `importlib.reload`.

    Args:
        plugins: "module", "module:function", a module, or a function of a `PluginRegistry`. The function of a module
            is `register`.

    Returns:
        The references of the plugins, as "module" or "module:function".

    Raises:
        PluginError: for a plugin that cannot be imported, that raises, or that takes a name that exists.
    """
    return [_load(plugin) for plugin in plugins]


def require_plugins(references: Iterable[str]) -> None:
    """Load the plugins that are not loaded in this process.

    Args:
        references: as returned by `load_plugins`.

    Raises:
        PluginError: as `load_plugins`.
    """
    load_plugins(reference for reference in references if reference not in _LOADED)


def load_installed_plugins() -> list[str]:
    """Load the plugins of installed packages: the entry points of the group `bdl_bench.plugins`.

    The environment variable BDL_BENCH_PLUGIN_AUTOLOAD=0 turns this off.

    Returns:
        The references of the plugins.

    Raises:
        PluginError: as `load_plugins`, with the name of the package.
    """
    if os.environ.get(AUTOLOAD) == "0":
        return []
    found: list[str] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.value):
        package = point.dist.name if point.dist is not None else point.name
        try:
            found += load_plugins([point.value])
        except PluginError as error:
            raise PluginError(
                f"a plugin of the installed package {package} that can be loaded",
                received=str(error),
                remedy=f"mend or uninstall {package}, or set {AUTOLOAD}=0.",
            ) from error
    return found


def loaded_plugins() -> dict[str, PluginRegistry]:
    """Return what each loaded plugin has added, by its reference."""
    return {reference: registry for reference, (_, registry) in _LOADED.items()}


def unload_plugin(reference: str) -> None:
    """Remove everything that a plugin has added; nothing happens if it is not loaded.

    Args:
        reference: as returned by `load_plugins`.
    """
    _, registry = _LOADED.pop(reference, (None, None))
    if registry is not None:
        registry.remove_all()


def _load(plugin: Plugin) -> str:
    reference, register, module = _resolved(plugin)
    known = _LOADED.get(reference)
    if known is not None and known[0] is register:
        return reference
    treat_as_user_code(module)  # so that its source, and not its version, is in the content key of records
    unload_plugin(reference)
    registry = PluginRegistry(reference)
    try:
        register(registry)
    except PluginError:
        registry.remove_all()
        raise
    except Exception as error:
        registry.remove_all()
        raise _cannot_load(reference, error) from error
    _LOADED[reference] = register, registry
    return reference


def _resolved(plugin: Plugin) -> tuple[str, Register, str]:
    """Return the reference of a plugin, its function, and the name of its module."""
    if isinstance(plugin, ModuleType):
        plugin = plugin.__name__
    if not isinstance(plugin, str):
        if not callable(plugin):
            raise PluginError(
                'a plugin as "module", "module:function", a module or a function',
                received=f"a {type(plugin).__name__}",
                remedy='plugins=["my_module"].',
            )
        module = getattr(plugin, "__module__", "__main__")
        return _reference(module, getattr(plugin, "__qualname__", type(plugin).__name__)), plugin, module
    module, _, name = plugin.partition(":")
    name = name or _REGISTER
    return _reference(module, name), _imported(module, name), module


def _reference(module: str, name: str) -> str:
    return module if name == _REGISTER else f"{module}:{name}"


def _imported(module: str, name: str) -> Register:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        if module not in sys.modules:
            importlib.invalidate_caches()  # a file that was just written
        found: Register = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        raise _cannot_load(_reference(module, name), error) from error
    if not callable(found):
        raise PluginError(
            f"a function {name}(registry) in {module}", received=f"a {type(found).__name__}", remedy="define one."
        )
    return found


def _cannot_load(reference: str, error: BaseException) -> PluginError:
    name = reference.partition(":")[2] or _REGISTER
    return PluginError(
        f"a plugin {reference!r} that can be imported and has a function {name}(registry)",
        received=f"{type(error).__name__}: {error}",
        remedy="name the module as Python imports it, from the folder of the module, or install its package.",
    )
