"""Plugins: methods, tasks, metrics and report sections from other packages and modules."""

from bdl_bench.plugins.loading import (
    load_installed_plugins,
    load_plugins,
    loaded_plugins,
    require_plugins,
    unload_plugin,
)
from bdl_bench.plugins.registry import PluginError, PluginRegistry, origin_of_method, origin_of_task, own_metrics
from bdl_bench.plugins.sections import SECTIONS, Section, SectionResults

__all__ = [
    "SECTIONS",
    "PluginError",
    "PluginRegistry",
    "Section",
    "SectionResults",
    "load_installed_plugins",
    "load_plugins",
    "loaded_plugins",
    "origin_of_method",
    "origin_of_task",
    "own_metrics",
    "require_plugins",
    "unload_plugin",
]
