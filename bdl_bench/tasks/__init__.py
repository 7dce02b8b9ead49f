"""The bundled tasks; importing this package registers them."""

from bdl_bench.tasks import diabetes, digits
from bdl_bench.tasks.registry import TASKS, Task, from_reference, register, resolve_task

__all__ = ["TASKS", "Task", "diabetes", "digits", "from_reference", "register", "resolve_task"]
