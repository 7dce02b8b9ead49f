"""The commands that reproduce a report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from bdl_bench.methods import METHODS
from bdl_bench.records.record import Record
from bdl_bench.tasks import TASKS

__all__ = ["command"]


def command(records: Sequence[Record]) -> str:
    """Return the command for these tasks, methods and seeds, and one line per problem that is defined in Python."""
    tasks = sorted({r.task for r in records})
    of_plugins = {r.task for r in records if "task" in r.plugins}
    bundled = [t for t in tasks if t in TASKS or t in of_plugins]
    references = [t for t in tasks if t not in bundled and ":" in t]
    lines = [_command_line(records, bundled, references)] if bundled or references else []
    lines += [_python(records, task) for task in tasks if task not in (*bundled, *references)]
    return "\n".join(lines)


def _command_line(records: Sequence[Record], bundled: Sequence[str], references: Sequence[str]) -> str:
    found = [record for record in records if record.task in (*bundled, *references)]
    words = ["bdl-bench", "compare", *bundled]
    for reference in references:
        words += ["--model", reference]
    seeds = _seeds(found)
    words += ["--methods", ",".join(_methods(found))]
    if seeds == list(range(len(seeds))):
        words += ["--seeds", str(len(seeds))]
    else:
        words += ["--seed-list", ",".join(map(str, seeds))]
    words += ["--tune-budget", str(_tune_budget(found))]
    words += ["--converged-map"] if _is_converged(found) else []
    words += [word for device in _devices(found) for word in ("--device", device)]
    words += [word for plugin in _plugins(found) for word in ("--plugin", plugin)]
    return shlex.join(words)


def _python(records: Sequence[Record], task: str) -> str:
    """Return the call that compares a problem which is defined in the code of the caller."""
    found = [record for record in records if record.task == task]
    options = [
        f"seeds={_seeds(found)}",
        f"tune_budget={_tune_budget(found)}",
        *(["converged_map=True"] if _is_converged(found) else []),
        *(f"device={d!r}" for d in _devices(found)),
        *([f"plugins={_plugins(found)}"] if _plugins(found) else []),
    ]
    name, comment = (task, "") if task.isidentifier() else ("problem", f"  # problem: {task!r}")
    return f"bdl_bench.compare({name}, {_methods(found)}, {', '.join(options)}){comment}"


def _methods(records: Sequence[Record]) -> list[str]:
    found = {record.method for record in records}
    return [*(name for name in METHODS if name in found), *sorted(found - METHODS.keys())]


def _seeds(records: Sequence[Record]) -> list[int]:
    return sorted({record.seed for record in records})


def _tune_budget(records: Sequence[Record]) -> int:
    return max((int(r.configuration.get("tune_budget", "0")) for r in records if r.status == "ok"), default=0)


def _plugins(records: Sequence[Record]) -> list[str]:
    return sorted({plugin for record in records for plugin in record.plugins.values()})


def _is_converged(records: Sequence[Record]) -> bool:
    """Return whether the networks were trained to a stationary point of L."""
    return any(record.training is not None and record.training.convergence is not None for record in records)


def _devices(records: Sequence[Record]) -> list[str]:
    """Return the device if it is not the CPU; of several, the first in the alphabet."""
    found = sorted({r.configuration.get("device", "cpu") for r in records if r.status == "ok"} - {"cpu"})
    return found[:1]
