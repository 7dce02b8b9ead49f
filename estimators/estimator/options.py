"""The options of an object: the arguments of its constructor, which only stores them, under their names."""

from __future__ import annotations

import inspect
from typing import Any

from estimators.errors import UnsupportedError

__all__ = ["constructor_options", "stored_option"]


def constructor_options(kind: type) -> list[str]:
    """Return the names of a constructor's arguments; `**keywords` stand for those of the constructor it extends."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def stored_option(part: Any, name: str) -> Any:  # noqa: ANN401
    """Return the argument that an object was constructed with. Raises UnsupportedError where it was not stored."""
    if not hasattr(part, name):
        raise UnsupportedError(
            f"a {type(part).__name__} that keeps each argument of its constructor under its name",
            received=f"one without {name!r}",
            remedy=f"store it: self.{name} = {name}; or construct and fit another.",
        )
    return getattr(part, name)
