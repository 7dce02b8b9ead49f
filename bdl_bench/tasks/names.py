"""Names of custom problems in a directory: different problems have different names, the same one keeps its name."""

from __future__ import annotations

import json
from collections.abc import Container
from itertools import count
from pathlib import Path

from filelock import FileLock

from bdl_bench.records.content_digests import content_digest
from bdl_bench.records.record import slug
from estimators.persistence.atomic import write_text

__all__ = ["identity_of", "name_in"]


def identity_of(problem: object) -> str:
    """Return an identifier of a problem, or of a function that makes problems, that does not depend on its code.

    A function of a module is identified by its name. A lambda, a nested function and a `Problem` are identified by the
    values that they hold, a lambda also by its code.
    """
    module, name = getattr(problem, "__module__", ""), getattr(problem, "__qualname__", "")
    if name and "<" not in name:
        return f"{module}:{name}"
    return f"{module}:{name}:{content_digest(problem, include_code=False)}"


def name_in(directory: Path, wanted: str, identity: str, *, taken: Container[str] = ()) -> str:
    """Return the name of a problem in a directory: `wanted`, with a number if another problem has that name.

    The name is stored in `tasks/<name>.json` of the directory, written once, so that concurrent runs agree.
    """
    names = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
    return next(name for name in names if name not in taken and _owner(directory, name, identity) == identity)


def _owner(directory: Path, name: str, identity: str) -> str:
    """Return the identity that has the name, which is this one if the name was free."""
    path = directory / "tasks" / f"{slug(name)}.json"
    lock = directory / "locks" / "tasks" / f"{slug(name)}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if not path.exists():
            write_text(path, json.dumps({"name": name, "identity": identity}))
    try:
        owner: str = json.loads(path.read_text(encoding="utf-8"))["identity"]
    except (ValueError, KeyError, TypeError):
        return ""
    return owner
