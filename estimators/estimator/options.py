"""The options of an object: the arguments of its constructor, which the constructor stores under their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

from estimators.errors import UnsupportedError
from estimators.models.subsets import SubsetSpec
from estimators.option_checks import PriorOption

__all__ = [
    "CommonOptions",
    "PriorOptions",
    "changed_options",
    "constructor_options",
    "inherits_options",
    "stored_option",
]

Init = TypeVar("Init", bound=Callable[..., None])


class PriorOptions(TypedDict, total=False):
    """The options of `UncertaintyEstimator` that describe the prior."""

    prior_precision: PriorOption
    prior_mean: PriorOption


class CommonOptions(TypedDict, total=False):
    """All options of `UncertaintyEstimator`. They are listed here in full, for tools that read no base class."""

    prior_precision: PriorOption
    prior_mean: PriorOption
    subset_of_weights: SubsetSpec


def inherits_options(base: type, options: type) -> Callable[[Init], Init]:
    """Return a decorator that shows inherited options in the signature of a constructor that takes them as `**options`.

    `inspect.signature` and `help` then list them after `model` and `likelihood`, with the defaults of the base class.

    Args:
        base: the class whose constructor declares the options.
        options: the TypedDict that names them.
    """
    declared = inspect.signature(base.__init__).parameters  # type: ignore[misc]
    inherited = [declared[name] for name in options.__annotations__]

    def decorate(init: Init) -> Init:
        signature = inspect.signature(init)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        first = next((i for i, p in enumerate(own) if p.kind is inspect.Parameter.KEYWORD_ONLY), len(own))
        parameters = [*own[:first], *inherited, *own[first:]]
        init.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return init

    return decorate


def constructor_options(kind: type) -> list[str]:
    """Return the names of a constructor's arguments; `**keywords` mean those of the constructor that it extends."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def changed_options(part: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the options of an object other than the model and the likelihood whose values are not the defaults."""
    defaults: dict[str, Any] = {}
    for base in type(part).__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            defaults = {**{name: p.default for name, p in parameters.items()}, **defaults}
    names = [name for name in constructor_options(type(part)) if name not in ("model", "likelihood")]
    values = {name: getattr(part, name) for name in names if hasattr(part, name)}
    return {name: value for name, value in values.items() if repr(value) != repr(defaults.get(name))}


def stored_option(part: Any, name: str) -> Any:  # noqa: ANN401
    """Return the argument that an object was constructed with. Raises UnsupportedError if it was not stored."""
    if not hasattr(part, name):
        raise UnsupportedError(
            f"a {type(part).__name__} that stores each argument of its constructor under its name",
            received=f"one without {name!r}",
            remedy=f"store it: self.{name} = {name}; or construct and fit another.",
        )
    return getattr(part, name)
