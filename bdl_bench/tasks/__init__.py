"""The bundled tasks. Importing this package imports all of its modules, which register their tasks."""

import importlib
import pkgutil

from bdl_bench.tasks.registry import TASKS, Task, from_reference, register, resolve_task

__all__ = ["TASKS", "Task", "from_reference", "register", "resolve_task"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
