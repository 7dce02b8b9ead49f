"""Packages that only some methods need: imported when one of these is used, with an error that says what to install."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from estimators.errors import UnsupportedError

__all__ = ["optional_module"]


def optional_module(name: str, *, purpose: str, install: str) -> Any:  # noqa: ANN401
    """Return a module of an optional package, imported now: `import estimators` does not need it.

    Args:
        name: the module, with dots.
        purpose: what the package is needed for; it ends the sentence "Expected the package ..., to".
        install: the argument of `pip install` that brings it, such as 'scipy' or '"bdl-bench[baselines]"'.

    Returns:
        The module.

    Raises:
        UnsupportedError: if importing the module raises ImportError, or RuntimeError, as a package does that was built
            for another version of torch.
    """
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:
        raise UnsupportedError(
            f"the package {name.partition('.')[0]}, to {purpose}",
            received=f"{type(error).__name__}: {error}",
            remedy=f"pip install {install}.",
        ) from error
