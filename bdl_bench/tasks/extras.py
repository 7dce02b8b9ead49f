"""Optional packages, imported where a task needs them: an error that names the extra where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from estimators.errors import UnsupportedError

__all__ = ["extra"]


def extra(module: str, *, name: str) -> Any:  # noqa: ANN401
    """The module, of a package in the extra `name`. Errors: UnsupportedError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"the package {module.partition('.')[0]}, of the extra {name!r}",
            received=f"{type(error).__name__}: {error}",
            remedy=f'pip install "bdl-bench[{name}]".',
        ) from error
