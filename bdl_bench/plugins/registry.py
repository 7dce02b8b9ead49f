"""The registry to which a plugin adds methods, tasks, metrics and sections of the report."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bdl_bench.methods import METHODS, Method
from bdl_bench.metrics import METRICS, Arrays, Metric
from bdl_bench.plugins.sections import SECTIONS, MakeSection
from bdl_bench.tasks import TASKS, Task
from estimators.errors import OptionError

__all__ = ["PluginError", "PluginRegistry", "origin_of_method", "origin_of_task", "own_metrics"]

Kind = Literal["method", "task", "metric", "section"]
_ORIGINS: dict[tuple[Kind, str], str] = {}
_RESERVED_KEYS = (
    "cls/", "reg/", "cal/", "sc/", "cov/", "cp/", "width/", "ood/", "shift/", "al/", "bo/", "dis/",
    "agreement/", "cost/", "fidelity/",
)  # fmt: skip
"""Prefixes of bdl-bench, by which the sections of a report find their metrics."""


class PluginError(OptionError):
    """A plugin cannot be loaded, takes a name that exists, or its metric fails."""


@dataclass
class PluginRegistry:
    """Receives the methods, tasks, metrics and sections of one plugin.

    A plugin is a module with a function `register(registry)`, which calls these methods. A name that exists raises
    `PluginError`. If `register` raises, nothing of the plugin stays.

    Args:
        origin: the plugin, as "module" or "module:function".

    Example:
        >>> from bdl_bench.plugins import Section
        >>> registry = PluginRegistry("my_plugin")
        >>> registry.add_section("empty", lambda results: Section("Nothing"))
        >>> registry.remove_all()
    """

    origin: str
    _added: list[tuple[Kind, str]] = field(default_factory=list)

    @property
    def added(self) -> tuple[tuple[Kind, str], ...]:
        """What the plugin has added, as (kind, name)."""
        return tuple(self._added)

    def add_method(self, method: Method) -> None:
        """Add a method of the comparison.

        Args:
            method: its function `build` must be importable: a function of a module, not a lambda, if jobs run in other
                processes.

        Raises:
            PluginError: if it is no Method, and for a name that exists or that the command line cannot name.
        """
        self._check_type(method, Method, "add_method(bdl_bench.methods.Method(name, summary, build))")
        self._add("method", method.name, METHODS, method)

    def add_task(self, task: Task) -> None:
        """Add a task.

        Args:
            task: its function `make(seed)` returns a `Problem`.

        Raises:
            PluginError: if it is no Task, and for a name that exists or that the command line cannot name.
        """
        self._check_type(task, Task, "add_task(bdl_bench.tasks.Task(name, summary, make))")
        self._add("task", task.name, TASKS, task)

    def add_metric(self, metric: Metric, *kinds: str) -> None:
        """Add a metric of the test rows. It is computed for new records, and for old ones when a report is rendered.

        Args:
            metric: with a key of its own, such as "my/MAE".
            kinds: "regression", "classification" or "binary", at least one.

        Raises:
            PluginError: if it is no Metric, for an unknown kind, for a metric with both or neither of `scores` and
                `compute`, for a key that exists or begins with a prefix of bdl-bench, such as reg/ or cal/, and for a
                key without a prefix.
        """
        self._check_type(metric, Metric, "add_metric(bdl_bench.metrics.Metric(...), 'regression')")
        if not kinds or not set(kinds) <= METRICS.keys():
            raise PluginError(
                f"kinds of likelihood among {', '.join(METRICS)}",
                received=", ".join(kinds) or "none",
                remedy=f"add_metric(metric, 'regression') in {self.origin}.",
            )
        self._check_free("metric", metric.key, {found.key for kind in kinds for found in METRICS[kind]})
        self._check_metric(metric)
        guarded = _guarded(metric, self.origin)
        for kind in kinds:
            METRICS[kind] = (*METRICS[kind], guarded)
        self._note("metric", metric.key)

    def add_section(self, name: str, make: MakeSection) -> None:
        """Add a section to each task of the report.

        Args:
            name: an identifier, which the report does not show.
            make: function of the results of a task that returns a `Section`, or None for a task without one.

        Raises:
            PluginError: for a name that exists, and for an object that cannot be called.
        """
        if not callable(make):
            raise PluginError(
                "registry.add_section(name, function of the results of a task)",
                received=f"a {type(make).__name__} from {self.origin}",
                remedy="pass a function that returns a bdl_bench.plugins.Section.",
            )
        self._add("section", name, SECTIONS, make)

    def remove_all(self) -> None:
        """Remove everything that the plugin has added."""
        tables: dict[str, MutableMapping[str, Any]] = {"method": METHODS, "task": TASKS, "section": SECTIONS}
        for kind, name in self._added:
            _ORIGINS.pop((kind, name), None)
            if kind == "metric":
                METRICS.update({k: tuple(m for m in found if m.key != name) for k, found in METRICS.items()})
            else:
                tables[kind].pop(name, None)
        self._added.clear()

    def _add(self, kind: Kind, name: str, table: MutableMapping[str, Any], value: object) -> None:
        if not name or name != name.strip() or any(sign in name for sign in ",:"):
            raise PluginError(
                f"a {kind} name without commas, colons and outer spaces",
                received=f"{name!r} from {self.origin}",
                remedy="a name such as 'my-method'.",
            )
        self._check_free(kind, name, table)
        table[name] = value
        self._note(kind, name)

    def _check_free(self, kind: Kind, name: str, taken: object) -> None:
        if name in taken:  # type: ignore[operator]
            owner = _ORIGINS.get((kind, name), "bdl-bench, or code that added it without a plugin")
            raise PluginError(
                f"a {kind} name that is free, from {self.origin}",
                received=f"{name!r}, which is of {owner}",
                remedy=f"rename the {kind} in the plugin.",
            )

    def _check_metric(self, metric: Metric) -> None:
        remedy = "Metric('my/MAE', 'MAE', 'mean absolute error', 'lower', scores=function)."
        if (metric.scores is None) == (metric.compute is None):
            expected, received = "a metric with either scores or compute", "both" if metric.compute else "neither"
            raise PluginError(expected, received=f"{received} of {metric.key!r} of {self.origin}", remedy=remedy)
        prefix, slash, name = metric.key.partition("/")
        if not (prefix and name) or f"{prefix}{slash}" in _RESERVED_KEYS:
            raise PluginError(
                f"a key with a prefix of your own before a slash, which is none of {', '.join(_RESERVED_KEYS)}",
                received=f"{metric.key!r} of {self.origin}",
                remedy=remedy,
            )

    def _note(self, kind: Kind, name: str) -> None:
        _ORIGINS[kind, name] = self.origin
        self._added.append((kind, name))

    def _check_type(self, value: object, kind: type, usage: str) -> None:
        if not isinstance(value, kind):
            raise PluginError(
                f"registry.{usage}",
                received=f"a {type(value).__name__} from {self.origin}",
                remedy="see docs/guide/plugins.md.",
            )


def origin_of_method(name: str) -> str | None:
    """Return the plugin that added a method.

    Args:
        name: of the method.

    Returns:
        The reference of the plugin; None if no plugin did.
    """
    return _ORIGINS.get(("method", name))


def own_metrics(kind: str) -> dict[str, tuple[Metric, str]]:
    """Return the metrics that plugins have added.

    Args:
        kind: the kind of the likelihood.

    Returns:
        Each metric and the reference of its plugin, by key.
    """
    found = {metric.key: (metric, _ORIGINS.get(("metric", metric.key))) for metric in METRICS[kind]}
    return {key: (metric, origin) for key, (metric, origin) in found.items() if origin is not None}


def origin_of_task(name: str) -> str | None:
    """Return the plugin that added a task.

    Args:
        name: of the task.

    Returns:
        The reference of the plugin; None if no plugin did.
    """
    return _ORIGINS.get(("task", name))


def _guarded(metric: Metric, origin: str) -> Metric:
    """Return a metric that names the plugin if it raises, or returns another shape than (M,) or a number."""

    def guard(function: Callable[[Arrays], Any], shape: Callable[[Arrays], tuple[int, ...]]) -> Callable[[Arrays], Any]:
        def guarded(arrays: Arrays) -> NDArray[np.float64]:
            try:
                value = np.asarray(function(arrays), dtype=np.float64)
            except Exception as error:
                raise PluginError(
                    f"a metric {metric.key} of {origin} that can be computed",
                    received=f"{type(error).__name__}: {error}",
                    remedy="mend the metric, or run without the plugin.",
                ) from error
            if value.shape != shape(arrays):
                raise PluginError(
                    f"values of shape {shape(arrays)} from the metric {metric.key} of {origin}",
                    received=f"shape {value.shape}",
                    remedy="scores returns one number per test row, compute one number.",
                )
            return value

        return guarded

    scores = None if metric.scores is None else guard(metric.scores, lambda arrays: (len(arrays["targets"]),))
    compute = None if metric.compute is None else guard(metric.compute, lambda _: ())
    return replace(metric, scores=scores, compute=compute)
